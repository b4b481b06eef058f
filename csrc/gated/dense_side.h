// Sides where no slot names an expert: every row is of all experts, and the ranks of all are multiplied together.
#pragma once

#include "common/grad_side.h"

namespace adamix {

template <typename T>
ADAMIX_BOTH bool is_dense(const GradSide<T>& side) {
  return side.routing.ids == nullptr;
}

// Narrow columns of a group that are multiplied together: of a dense side, [N, groups, experts, ranks], those of all.
template <typename T>
ADAMIX_BOTH int joined_ranks(const GradSide<T>& side) {
  return is_dense(side) ? side.experts * side.ranks : side.ranks;
}

// Blocks that compute a side's gradients from one share of the rows.
template <typename T>
ADAMIX_BOTH int blocks_of_side(const GradSide<T>& side, int narrow) {
  if (!is_dense(side)) return side.experts * blocks_an_expert(side, narrow);
  if (side.experts == 0) return 0;
  return side.groups * max_of(1, ceil_div(joined_ranks(side), narrow)) * max_of(1, ceil_div(side.cols, kTileCols));
}

#if defined(ADAMIX_LAUNCHERS)
// Shared memory of a block of gated_weight_grad for so many narrow columns.
template <typename T>
size_t gated_grad_block_bytes(int ranks);
#endif

}  // namespace adamix
