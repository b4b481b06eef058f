// Weight gradients of a routed bank: the sum over an expert's rows of wide[row][c] * narrow[row][q].
//
// A block has kTileCols columns c and Narrow columns q of one expert, and one share of the rows. It multiplies the
// rows that its expert serves, in their order; the others are not loaded.
#pragma once

#include "common/gather_rows.h"
#include "common/grad_side.h"

namespace adamix {

// What one block computes.
struct GradJob {
  int expert, group, col0, rank0;
};

template <typename T, int Narrow>
ADAMIX_DEVICE GradJob job_of(const GradSide<T>& side, int number) {
  int col_chunks = max_of(1, ceil_div(side.cols, kTileCols));
  int rank_chunks = max_of(1, ceil_div(side.ranks, Narrow));
  GradJob job;
  job.col0 = number % col_chunks * kTileCols;
  number /= col_chunks;
  job.rank0 = number % rank_chunks * Narrow;
  number /= rank_chunks;
  job.group = number % side.groups;
  job.expert = number / side.groups;
  return job;
}

template <typename T, int Narrow>
struct GradTile {
  static constexpr int kRows = kInner<T>;  // multiplied at a time
  static constexpr int kWide = kRows * pitch_of<T>(kTileCols);
  static constexpr int kNarrow = kRows * pitch_of<T>(Narrow);
  static_assert(2 * kWide * sizeof(T) >= kTileCols * kPatchPitch * sizeof(float), "the patch fits the wide stages");

  T* wide_;         // two of [kRows, kTileCols]
  T* narrow_;       // two of [kRows, Narrow]
  float* patch;     // [kTileCols, Narrow] in the place of the wide stages
  float* bias_sum;  // [kTileThreads]
  RowList list;

  template <typename Memory>
  ADAMIX_BOTH explicit GradTile(Memory& memory)
      : wide_(memory.template take<T>(2 * kWide)),
        narrow_(memory.template take<T>(2 * kNarrow)),
        patch(reinterpret_cast<float*>(wide_)),
        bias_sum(memory.template take<float>(kTileThreads)),
        list(memory) {}
  ADAMIX_DEVICE T* wide(int stage) const { return wide_ + stage * kWide; }
  ADAMIX_DEVICE T* narrow(int stage) const { return narrow_ + stage * kNarrow; }
};

// The sum of a column of a [Rows, Cols] tile, over every (kTileThreads / Cols)-th row, for thread t column t % Cols.
template <int Rows, int Cols, typename T>
ADAMIX_DEVICE float column_sum(const T* tile) {
  float sum = 0.f;
#pragma unroll 8
  for (int row = threadIdx.x / Cols; row < Rows; row += kTileThreads / Cols) {
    sum += to_float(tile[row * pitch_of<T>(Cols) + threadIdx.x % Cols]);
  }
  return sum;
}

// bias[expert][col0 + c] = the sum of the threads' column sums.
template <int Cols, typename T>
ADAMIX_DEVICE void store_bias(const Grad<T>& bias, float* plane, float* scratch, float own, int expert, int col0,
                              int cols) {
  scratch[threadIdx.x] = own;
  __syncthreads();
  int col = threadIdx.x;
  if (col >= Cols || col0 + col >= cols) return;
  float sum = scratch[col];
#pragma unroll
  for (int i = 1; i < kTileThreads / Cols; ++i) sum += scratch[i * Cols + col];
  store_grad(bias, plane, static_cast<int64_t>(expert) * cols + col0 + col, sum);
}

// One job, for the share blockIdx.y of the rows: its part of the weight's gradient times `scale`, and of the bias'.
//
// change_wide(tile, row_of), change_narrow(tile): see change_tile; row_of(i) is the row number of the tile's row i.
template <typename T, int Narrow, typename ChangeWide, typename ChangeNarrow>
ADAMIX_DEVICE void weight_grad(const GradTile<T, Narrow>& tile, const GradSide<T>& side, const GradJob& job,
                               const RowShares& shares, float scale, ChangeWide change_wide,
                               ChangeNarrow change_narrow) {
  constexpr int kRows = GradTile<T, Narrow>::kRows;
  constexpr int kWidePitch = pitch_of<T>(kTileCols), kNarrowPitch = pitch_of<T>(Narrow);
  int64_t first = blockIdx.y * shares.rows_a_share;
  int64_t rows = shares.rows - first < shares.rows_a_share ? shares.rows - first : shares.rows_a_share;
  const T* narrow = side.narrow + job.group * side.ranks + job.rank0;
  int narrow_cols = side.groups * side.ranks;
  bool bias_of_wide = side.bias_of == BiasOf::kWide && job.rank0 == 0;
  bool bias_of_narrow = side.bias_of == BiasOf::kNarrow && job.col0 == 0;
  float bias = 0.f;
  WarpTile<T> sums[Narrow / 16];
#pragma unroll
  for (int i = 0; i < Narrow / 16; ++i) sums[i].zero();

  int held = 0;
  for (int64_t from = 0; from < rows; from += kScan) {
    int count = rows - from < kScan ? static_cast<int>(rows - from) : kScan;
    held = tile.list.append(held, static_cast<int>(first), static_cast<int>(from), count, side.routing, side.other,
                            job.expert, side.wide);
    int steps = from + kScan < rows ? held / kRows : ceil_div(held, kRows);
    pipeline(
        steps,
        [&](int step, int stage) {
          auto kept = [&](int row) { return step * kRows + row < held; };
          load_tile<kRows, kTileCols, kTileThreads>(
              tile.wide(stage), side.wide.data + job.col0,
              [&](int row) { return tile.list.offset[step * kRows + row]; }, kept, side.cols - job.col0,
              side.wide.aligned);
          load_tile<kRows, Narrow, kTileThreads>(
              tile.narrow(stage), narrow,
              [&](int row) { return (first + tile.list.row[step * kRows + row]) * narrow_cols; }, kept,
              side.ranks - job.rank0, side.narrow_aligned);
        },
        [&](int step, int stage) {
          change_wide(tile.wide(stage), [&](int row) {
            int at = step * kRows + row;
            return at < held ? first + tile.list.row[at] : first;
          });
          change_narrow(tile.narrow(stage));
        },
        [&](int, int stage) {
          const T* wide = tile.wide(stage) + this_warp() * 16;
#pragma unroll
          for (int k = 0; k < kRows; k += 16) {
            WarpTile<T>::template add_products<Inner::kStrided, Inner::kStrided>(
                sums, wide + k * kWidePitch, kWidePitch, tile.narrow(stage) + k * kNarrowPitch, kNarrowPitch);
          }
          if (bias_of_wide) bias += column_sum<kRows, kTileCols>(tile.wide(stage));
          if (bias_of_narrow) bias += column_sum<kRows, Narrow>(tile.narrow(stage));
        });
    tile.list.keep(steps * kRows, held);
    held -= held < steps * kRows ? held : steps * kRows;
  }

  float* plane = shares.planes == nullptr ? nullptr : shares.planes + blockIdx.y * shares.plane_size;
  store_patch(sums, tile.patch);
  if (bias_of_wide) store_bias<kTileCols>(side.bias, plane, tile.bias_sum, bias, job.expert, job.col0, side.cols);
  if (bias_of_narrow) store_bias<Narrow>(side.bias, plane, tile.bias_sum, bias, job.expert, job.rank0, side.ranks);
  __syncthreads();
  int64_t range = static_cast<int64_t>(job.expert) * side.groups + job.group;
  for (int i = threadIdx.x; i < kTileCols * Narrow; i += kTileThreads) {
    // Neighbouring threads write neighbouring elements.
    int c = side.ranks_first ? i % kTileCols : i / Narrow, q = side.ranks_first ? i / kTileCols : i % Narrow;
    int col = job.col0 + c, rank = job.rank0 + q;
    if (col >= side.cols || rank >= side.ranks) continue;
    int64_t at = side.ranks_first ? (range * side.ranks + rank) * side.cols + col
                                  : (range * side.cols + col) * side.ranks + rank;
    store_grad(side.weight, plane, at, scale * tile.patch[c * kPatchPitch + q]);
  }
}

}  // namespace adamix
