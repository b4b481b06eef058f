// A dense side's weight gradients: a block has columns of the wide tensor and narrow columns of all experts.
#pragma once

#include "common/weight_grad.h"
#include "gated/dense_side.h"

namespace adamix {

// A dense side's job, for the share blockIdx.y of the rows, which are all as far apart. change_wide(tile, row, column):
// of the tile's rows and columns from those on; see change_tile.
template <typename T, int Narrow, typename ChangeWide>
ADAMIX_DEVICE void dense_grad(const GradTile<T, Narrow>& tile, const GradSide<T>& side, int number,
                              const RowShares& shares, ChangeWide change_wide) {
  constexpr int kRows = GradTile<T, Narrow>::kRows;
  constexpr int kWidePitch = pitch_of<T>(kTileCols), kNarrowPitch = pitch_of<T>(Narrow);
  int ranks = joined_ranks(side), col_chunks = max_of(1, ceil_div(side.cols, kTileCols));
  int rank_chunks = max_of(1, ceil_div(ranks, Narrow));
  int col0 = number % col_chunks * kTileCols, rank0 = number / col_chunks % rank_chunks * Narrow;
  int group = number / col_chunks / rank_chunks, pitch = side.groups * ranks;
  int64_t first = blockIdx.y * shares.rows_a_share;
  int rows = static_cast<int>(shares.rows - first < shares.rows_a_share ? shares.rows - first : shares.rows_a_share);
  int64_t apart = side.wide.tokens.by > 1 ? side.wide.token_stride : side.wide.batch_stride;
  const T* wide = side.wide.data + first * apart + col0;
  const T* narrow = side.narrow + first * pitch + group * ranks + rank0;
  bool bias_of_narrow = side.bias_of == BiasOf::kNarrow && col0 == 0;
  float bias = 0.f;
  WarpTile<T> sums[Narrow / 16];
#pragma unroll
  for (int i = 0; i < Narrow / 16; ++i) sums[i].zero();
  pipeline(
      rows > 0 ? ceil_div(rows, kRows) : 0,
      [&](int step, int stage) {
        int from = step * kRows;
        auto kept = [&](int row) { return from + row < rows; };
        load_tile<kRows, kTileCols, kTileThreads>(
            tile.wide(stage), wide, [&](int row) { return (from + row) * apart; }, kept, side.cols - col0,
            side.wide.aligned);
        load_tile<kRows, Narrow, kTileThreads>(
            tile.narrow(stage), narrow, [&](int row) { return static_cast<int64_t>(from + row) * pitch; }, kept,
            ranks - rank0, side.narrow_aligned);
      },
      [&](int step, int stage) { change_wide(tile.wide(stage), first + step * kRows, col0); },
      [&](int, int stage) {
        const T* own = tile.wide(stage) + this_warp() * 16;
#pragma unroll
        for (int k = 0; k < kRows; k += 16) {
          WarpTile<T>::template add_products<Inner::kStrided, Inner::kStrided>(
              sums, own + k * kWidePitch, kWidePitch, tile.narrow(stage) + k * kNarrowPitch, kNarrowPitch);
        }
        if (bias_of_narrow) bias += column_sum<kRows, Narrow>(tile.narrow(stage));
      });

  float* plane = shares.planes == nullptr ? nullptr : shares.planes + blockIdx.y * shares.plane_size;
  store_patch(sums, tile.patch);
  if (bias_of_narrow) store_bias<Narrow>(side.bias, plane, tile.bias_sum, bias, 0, rank0, ranks);
  __syncthreads();
  for (int i = threadIdx.x; i < kTileCols * Narrow; i += kTileThreads) {
    // Neighbouring threads write neighbouring elements.
    int c = side.ranks_first ? i % kTileCols : i / Narrow, q = side.ranks_first ? i / kTileCols : i % Narrow;
    int col = col0 + c, rank = rank0 + q;
    if (col >= side.cols || rank >= ranks) continue;
    int expert = rank / side.ranks;
    int64_t range = static_cast<int64_t>(expert) * side.groups + group;
    rank -= expert * side.ranks;
    int64_t at = side.ranks_first ? (range * side.ranks + rank) * side.cols + col
                                  : (range * side.cols + col) * side.ranks + rank;
    store_grad(side.weight, plane, at, tile.patch[c * kPatchPitch + q]);
  }
}

}  // namespace adamix
