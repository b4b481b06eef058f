// Sharing rows out between blocks: how many shares, and memory for their planes.
#pragma once

#include "common/checks.h"
#include "common/grad_side.h"

namespace adamix {

// `rows` in `count` shares, each a multiple of `unit` rows, and memory for what `sum` adds up, which `planes` holds.
template <typename T>
RowShares cut_rows(int count, int unit, int64_t rows, PlaneSum<T>& sum, const Tensor& like, OptionalTensor& planes) {
  RowShares shares{nullptr, sum.plane_size, rows, rows, count};
  if (count > 1) {
    planes = allocate(like, {count, sum.plane_size}, ScalarType::Float);
    shares.planes = data<float>(planes);
    shares.rows_a_share = ((rows + count - 1) / count + unit - 1) / unit * unit;
  }
  sum.planes = shares.planes;
  sum.shares = count;
  return shares;
}

// The same for the sides of a backward.
template <typename T>
RowShares share_rows(const GradSide<T>& first, const GradSide<T>& second, int narrow, int64_t rows, PlaneSum<T>& sum,
                     const Tensor& like, const Device& device, OptionalTensor& planes) {
  int64_t blocks = 0, row_bytes = 0;
  for (const GradSide<T>* side : {&first, &second}) {
    if (side->experts == 0) continue;
    blocks += blocks_an_expert(*side, narrow);
    row_bytes += static_cast<int64_t>(side->groups) * side->cols * sizeof(T);
  }
  int count = count_shares(rows, blocks, row_bytes, sum.plane_size, device);
  return cut_rows(count, kTileRows, rows, sum, like, planes);
}

}  // namespace adamix
