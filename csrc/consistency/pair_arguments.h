// The consistency losses' tensors, checked: what the entries of consistency.cpp share.
#pragma once

#include "common/checks.h"

namespace adamix {

// Both passes' rows: `skip` outer rows of `second` come before its first.
struct Pairs {
  Tensor first, second;
  int64_t skip;
  int rows, classes;
  OptionalTensor labels, mask, items;
};

// Both passes in two tensors, or in one, and what says which rows count. They throw std::runtime_error that names the
// argument.
Pairs check_pair(const Tensor& logits_a, const Tensor& logits_b, const OptionalTensor& mask);
Pairs check_doubled(const Tensor& logits, const Tensor& labels, const OptionalTensor& mask,
                    const OptionalTensor& num_items);

// Rows of a tensor of these leading sizes.
int row_count(const char* name, const std::vector<int64_t>& leading);

void check_classes(const char* name, const Tensor& logits, const char* layout);
void check_float(const char* name, const Tensor& tensor, const char* like_name, const Tensor& like, const char* layout,
                 const std::vector<int64_t>& sizes);
// Of the logits' shape, if there is one.
void check_gradient(const char* name, const OptionalTensor& gradient, const char* like_name, const Tensor& like);

}  // namespace adamix
