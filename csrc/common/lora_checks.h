// Checks of what LoRA's ops have in common: groups of columns and dropout.
#pragma once

#include "common/checks.h"
#include "common/column_ranges.h"
#include "common/dropout.h"

namespace adamix {

// width: how many columns there are, or -1 for as many as the groups reach.
ColumnRanges check_ranges(const std::vector<int64_t>& offsets, int64_t groups, int64_t cols, int64_t width);

// seed: where the kernels run; p: the probability.
Dropout check_dropout(const OptionalTensor& seed, double p, const Tensor& x);

}  // namespace adamix
