// What the routed adapter and routed LoRA share: tiles of 64 rows, each row served by an expert of its own.
//
// A tile that several experts serve is multiplied by each of them and every row keeps its own expert's result, so
// rows need no sorting. Rows of one sample share an expert: such tiles see one expert, or two at a sample's edge.
#pragma once

#include "common/copy.h"
#include "common/piece.h"
#include "common/rows.h"
#include "common/shared_memory.h"
#include "common/tile_sizes.h"
#include "common/warp_tile.h"

namespace adamix {

constexpr int kPatchPitch = kTileCols + 4;

ADAMIX_DEVICE int this_warp() { return threadIdx.x / 32; }
ADAMIX_DEVICE int this_lane() { return threadIdx.x % 32; }

// Two stages of operand tiles, and room for each warp's sums. Narrow: columns of the narrow product.
template <typename T, int Narrow>
struct Stages {
  static constexpr int kLeft = kTileRows * pitch_of<T>(kInner<T>);
  // The right operand of a narrow product [Narrow, kInner], of a wide one [kTileCols, Narrow], or their transposes.
  static constexpr int kRight = max_of(max_of(Narrow * pitch_of<T>(kInner<T>), kInner<T>* pitch_of<T>(Narrow)),
                                       max_of(kTileCols* pitch_of<T>(Narrow), Narrow* pitch_of<T>(kTileCols)));
  static_assert(2 * kLeft * sizeof(T) >= kTileRows * kPatchPitch * sizeof(float), "the patch fits the left stages");

  T* left_;      // two of [kTileRows, kInner]
  T* right_;     // two
  float* patch;  // [kTileRows, kTileCols] in the place of the left stages; each warp uses its own rows

  template <typename Memory>
  ADAMIX_BOTH explicit Stages(Memory& memory) {
    left_ = memory.template take<T>(2 * kLeft);
    right_ = memory.template take<T>(2 * kRight);
    patch = reinterpret_cast<float*>(left_);
  }
  ADAMIX_DEVICE T* left(int stage) const { return left_ + stage * kLeft; }
  ADAMIX_DEVICE T* right(int stage) const { return right_ + stage * kRight; }
};

// Runs compute(step, stage) for every step, while the copies that load(step + 1, other stage) starts are under way.
// ready(step, stage) may change what this thread loaded. All threads call; a barrier stands before and after compute.
template <typename Load, typename Ready, typename Compute>
ADAMIX_DEVICE void pipeline(int steps, Load load, Ready ready, Compute compute) {
  if (steps > 0) load(0, 0);
  copy_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1, (step + 1) % 2);
    copy_commit();
    copy_wait<1>();
    ready(step, step % 2);
    __syncthreads();
    compute(step, step % 2);
    __syncthreads();
  }
}

// The warp's rows of patch = its sums; complete for the warp on return.
template <typename T, int Count>
ADAMIX_DEVICE void store_patch(const WarpTile<T> (&sums)[Count], float* patch) {
#pragma unroll
  for (int tile = 0; tile < Count; ++tile) {
    sums[tile].store(patch + this_warp() * kWarpRows * kPatchPitch + tile * 16, kPatchPitch);
  }
  __syncwarp();
}

// Calls visit(row, col, values) for every piece of 16 bytes in the warp's rows of a patch of `cols` columns, where
// row is the row in the tile and values the fp32 sums of Piece<T>::kSize columns. The patch is free on return.
template <typename T, int Cols, typename Visit>
ADAMIX_DEVICE void visit_patch(const float* patch, Visit visit) {
  constexpr int kSize = Piece<T>::kSize;
  constexpr int kPieces = Cols / kSize;
#pragma unroll 2
  for (int i = 0; i < kWarpRows * kPieces / 32; ++i) {
    int piece = i * 32 + this_lane();
    int row = this_warp() * kWarpRows + piece / kPieces, col = piece % kPieces * kSize;
    visit(row, col, patch + row * kPatchPitch + col);
  }
  __syncwarp();
}

// tile[i][j] = matrix[(row0 + i) * cols + col0 + j], zero outside [rows, cols]; see load_tile.
template <int Rows, int Cols, typename T>
ADAMIX_DEVICE void load_matrix(T* tile, const T* matrix, int row0, int rows, int col0, int cols, bool aligned) {
  load_tile<Rows, Cols, kTileThreads>(
      tile, matrix + col0, [&](int i) { return static_cast<int64_t>(row0 + i) * cols; },
      [&](int i) { return row0 + i < rows; }, cols - col0, aligned);
}

// Narrow product: sums[row][0..Narrow) over the inner dimension of left[row][k] * right[n][k] (or right[k][n]).
// load_left(tile, k0), load_right(tile, k0): start the copies of kInner inner indices; change_left(tile, k0): see
// pipeline. The sums end in the warps' rows of stages.patch.
template <typename T, int Narrow, Inner Right, typename LoadLeft, typename ChangeLeft, typename LoadRight>
ADAMIX_DEVICE void narrow_product(const Stages<T, Narrow>& stages, int inner, LoadLeft load_left,
                                  ChangeLeft change_left, LoadRight load_right) {
  constexpr int kPitch = pitch_of<T>(kInner<T>);
  constexpr int kRightPitch = Right == Inner::kContiguous ? kPitch : pitch_of<T>(Narrow);
  WarpTile<T> sums[Narrow / 16];
#pragma unroll
  for (int tile = 0; tile < Narrow / 16; ++tile) sums[tile].zero();
  __syncthreads();  // a warp may still read the patch, which lies where the left operand goes
  pipeline(
      ceil_div(inner, kInner<T>),
      [&](int step, int stage) {
        load_left(stages.left(stage), step * kInner<T>);
        load_right(stages.right(stage), step * kInner<T>);
      },
      [&](int step, int stage) { change_left(stages.left(stage), step * kInner<T>); },
      [&](int step, int stage) {
        const T* left = stages.left(stage) + this_warp() * kWarpRows * kPitch;
#pragma unroll
        for (int k = 0; k < kInner<T>; k += 16) {
          if (step * kInner<T> + k >= inner) break;
          WarpTile<T>::template add_products<Inner::kContiguous, Right>(
              sums, left + k, kPitch, stages.right(stage) + k * (Right == Inner::kContiguous ? 1 : kRightPitch),
              kRightPitch);
        }
      });
  store_patch(sums, stages.patch);
}

// Wide product: for every kTileCols columns, sums[row][n] over the narrow dimension of left[row][k] * right[n][k]
// (or right[k][n]), with left [kTileRows, inner] resident in shared memory (pitch left_pitch, zero beyond `inner` up
// to a multiple of 16). load_right(tile, col0, k0) starts the copies; finish(col0) is called with the sums in the
// warps' rows of stages.patch.
template <typename T, int Narrow, Inner Right, typename LoadRight, typename Finish>
ADAMIX_DEVICE void wide_product(const Stages<T, Narrow>& stages, const T* left, int left_pitch, int inner, int cols,
                                LoadRight load_right, Finish finish) {
  constexpr int kRightPitch = Right == Inner::kContiguous ? pitch_of<T>(Narrow) : pitch_of<T>(kTileCols);
  int inner_steps = max_of(1, ceil_div(inner, Narrow));
  WarpTile<T> sums[kTileCols / 16];
  pipeline(
      ceil_div(cols, kTileCols) * inner_steps,
      [&](int step, int stage) {
        load_right(stages.right(stage), step / inner_steps * kTileCols, step % inner_steps * Narrow);
      },
      [&](int, int) {},
      [&](int step, int stage) {
        int k0 = step % inner_steps * Narrow;
        if (k0 == 0) {
#pragma unroll
          for (int tile = 0; tile < kTileCols / 16; ++tile) sums[tile].zero();
        }
        const T* own = left + this_warp() * kWarpRows * left_pitch + k0;
#pragma unroll
        for (int k = 0; k < Narrow; k += 16) {
          if (k0 + k >= inner) break;
          WarpTile<T>::template add_products<Inner::kContiguous, Right>(
              sums, own + k, left_pitch, stages.right(stage) + k * (Right == Inner::kContiguous ? 1 : kRightPitch),
              kRightPitch);
        }
        if (step % inner_steps == inner_steps - 1) {
          store_patch(sums, stages.patch);
          finish(step / inner_steps * kTileCols);
        }
      });
}

}  // namespace adamix
