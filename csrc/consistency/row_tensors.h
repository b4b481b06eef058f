// Rows of tensors as the consistency kernels see them: whatever the leading dimensions, two strides.
#pragma once

#include <algorithm>

#include "common/checks.h"
#include "consistency/consistency.h"

namespace adamix {

// How rows [outer, inner] lie in a tensor whose leading dimensions they are; strides in elements.
struct Leading {
  int64_t outer_stride = 0, inner_stride = 0, inner = 1;
  bool fits = true;  // the inner ones are evenly spaced

  // [outer * inner, 1] where all are, which a kernel finds without a division.
  Leading flat() const {
    bool even = inner > 1 && outer_stride == inner * inner_stride;
    return even ? Leading{inner_stride, 0, 1, fits} : *this;
  }
};

inline Leading leading_of(const Tensor& tensor, int64_t dims) {
  Leading rows;
  for (int64_t i = dims - 1; i > 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (rows.inner == 1) rows.inner_stride = tensor.stride(i);
    rows.fits = rows.fits && tensor.stride(i) == rows.inner_stride * rows.inner;
    rows.inner *= tensor.size(i);
  }
  if (dims > 0) rows.outer_stride = tensor.stride(0);
  rows.inner = std::max<int64_t>(rows.inner, 1);
  return rows;
}

inline std::vector<int64_t> leading_sizes(const Tensor& tensor) {
  auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end() - 1);
}

inline bool rows_lie_well(const Tensor& tensor) {
  int64_t last = tensor.dim() - 1;
  return leading_of(tensor, last).fits && (tensor.stride(last) == 1 || tensor.size(last) == 1);
}

inline Tensor with_rows(const Tensor& tensor) { return rows_lie_well(tensor) ? tensor : as_contiguous(tensor); }

template <typename T>
Rows<T> pair_rows(const Tensor& tensor, int64_t skip) {
  Leading rows = leading_of(tensor, tensor.dim() - 1), flat = rows.flat();
  return {data<T>(tensor) + skip * rows.outer_stride, flat.outer_stride, flat.inner_stride,
          divisor(static_cast<int>(flat.inner)), false};
}

// One value a row, or none.
template <typename T>
PerRow<T> per_row(OptionalTensor& tensor) {
  if (!tensor.has_value()) return {nullptr, 0, 0, divisor(1)};
  if (!leading_of(*tensor, tensor->dim()).fits) tensor = as_contiguous(*tensor);
  Leading rows = leading_of(*tensor, tensor->dim()).flat();
  return {static_cast<const T*>(tensor->data_ptr()), rows.outer_stride, rows.inner_stride,
          divisor(static_cast<int>(rows.inner))};
}

// Where a gradient is written: the tensor itself where its rows lie well, else a copy that is put back.
class Target {
 public:
  explicit Target(const OptionalTensor& wanted) : wanted_(wanted), written_(wanted) {
    if (!wanted.has_value() || rows_lie_well(*wanted)) return;
    auto sizes = wanted->sizes();
    written_ = allocate(*wanted, std::vector<int64_t>(sizes.begin(), sizes.end()));
  }
  template <typename T>
  Rows<T> rows(int64_t skip = 0) const {
    return written_.has_value() ? pair_rows<T>(*written_, skip) : Rows<T>{nullptr, 0, 0, divisor(1), false};
  }
  void put_back() {
    if (wanted_.has_value() && wanted_->data_ptr() != written_->data_ptr()) torch::stable::copy_(*wanted_, *written_);
  }

 private:
  OptionalTensor wanted_, written_;
};

}  // namespace adamix
