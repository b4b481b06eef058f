// One side of a routed op's backward, as weight_grad.h computes it.
#pragma once

#include "common/planes.h"
#include "common/rows.h"
#include "common/tile_sizes.h"

namespace adamix {

enum class BiasOf : int { kNone, kWide, kNarrow };

// The wide and the narrow operand hold `groups` ranges of columns, multiplied pairwise.
template <typename T>
struct GradSide {
  Rows<const T> wide;      // [B, S, ...], from the first column of a group on
  const T* narrow;         // [N, groups * ranks]
  Routing routing, other;  // of this side and of the other one
  Grad<T> weight;          // [experts, groups * ranks, cols] if ranks_first, else [experts, groups * cols, ranks]
  Grad<T> bias;            // the sum of the wide operand [experts, cols], or of the narrow one [experts, ranks]
  BiasOf bias_of;
  int experts;  // 0: nothing is wanted
  int groups, cols, ranks;
  bool ranks_first;
  bool narrow_aligned;  // rows of a group start at multiples of 16 bytes
};

// Blocks that compute one expert's gradients from one share of the rows.
template <typename T>
ADAMIX_BOTH int blocks_an_expert(const GradSide<T>& side, int narrow) {
  return side.groups * max_of(1, ceil_div(side.ranks, narrow)) * max_of(1, ceil_div(side.cols, kTileCols));
}

}  // namespace adamix
