// The ranges of output columns that LoRA's groups serve.
#pragma once

#include "common/platform.h"

namespace adamix {

constexpr int kMaxGroups = 64;

// Which columns of the output the groups serve, and which none of them.
struct ColumnRanges {
  int groups;
  int cols;  // Ng, of a group
  int start[kMaxGroups];
  int gaps;
  int gap_start[kMaxGroups + 1];
  int gap_cols[kMaxGroups + 1];
};

}  // namespace adamix
