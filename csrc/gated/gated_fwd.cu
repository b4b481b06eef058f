// The forward with gates for any rows: one launch; what is narrow is read again by the block that wrote it.
#include "common/piece.h"
#include "gated/gated_tile.h"
#include "gated/mix_rows.h"

namespace adamix {

// kNarrow columns from col0 on of a group of B, kInner inner indices from k0 on: the ranks of some experts, one after
// the other, and then their biases.
template <typename T>
ADAMIX_DEVICE void load_up(T* right, const GatedForward<T>& p, int group, int col0, int expert, int experts, int k0) {
  constexpr int kNarrow = GatedTile<T>::kNarrow, kSize = Piece<T>::kSize, kPieces = kInner<T> / kSize;
  int cols = p.ranges.cols, weights = experts * p.rank;
  int inner = weights + (p.up_bias == nullptr ? 0 : experts);
  bool aligned = p.up_aligned && p.rank % kSize == 0;
  for (int i = threadIdx.x; i < kNarrow * kPieces; i += kTileThreads) {
    int col = col0 + i / kPieces, k = k0 + i % kPieces * kSize;
    T* target = right + i / kPieces * pitch_of<T>(kInner<T>) + i % kPieces * kSize;
    auto from = [&](int at) {
      int of = static_cast<int>(p.by_rank.quotient(at));
      int64_t range = static_cast<int64_t>(expert + of) * p.ranges.groups + group;
      return p.up + (range * cols + col) * p.rank + at - of * p.rank;
    };
    if (aligned && col < cols && k + kSize <= weights) {
      copy_async(target, from(k));
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < kSize; ++e) {
      int at = k + e;
      T value = from_float<T>(0.f);
      if (col < cols && at < weights) value = *from(at);
      if (col < cols && at >= weights && at < inner) {
        value = p.up_bias[static_cast<int64_t>(expert + at - weights) * cols + col];
      }
      target[e] = value;
    }
  }
}

// `cols` columns of out from `start` on = those of base, or zeros, for the tile's rows.
template <typename T>
ADAMIX_DEVICE void copy_gap(const GatedForward<T>& p, const GatedTile<T>& tile, int start, int cols) {
  constexpr int kSize = Piece<T>::kSize;
  bool aligned = start % kSize == 0;
  for (int row = this_warp(); row < tile.count; row += kTileThreads / 32) {
    const T* from = p.base.data == nullptr ? nullptr : p.base.data + tile.added_offset[row] + start;
    T* to = p.out + (tile.first + row) * p.width + start;
    for (int col = this_lane() * kSize; col < cols; col += 32 * kSize) {
      Piece<T> piece{};
      if (from != nullptr) piece = load_piece(from + col, cols - col, aligned && p.base.aligned);
      store_piece(to + col, piece, cols - col, aligned && p.out_aligned);
    }
  }
}

template <typename T>
ADAMIX_BOTH int kept_cols_of(const GatedForward<T>& p) {
  return kept_cols<T>(p.gates.up, p.rank, p.up_bias != nullptr);
}

// Whether a row's slots lie as what is kept of it does.
template <typename T>
ADAMIX_BOTH bool mixes_in_place(const GatedForward<T>& p) {
  return kept_cols_of(p) > 0 && p.ranges.groups == 1 && !p.gates.up.differ();
}

// What is kept of a row, zeros behind it and in rows that are not there. All lanes of a warp call.
template <typename T>
ADAMIX_DEVICE void keep_row(const GatedForward<T>& p, const GatedTile<T>& tile, int row) {
  T* kept = tile.kept + row * tile.kept_cols;
  int weights = p.gates.up.slots * p.rank, cols = weights + (p.up_bias == nullptr ? 0 : p.gates.up.slots);
  bool there = row < tile.count && tile.served[row];
  for (int col = (there ? cols : 0) + this_lane(); col < tile.kept_cols; col += 32) kept[col] = from_float<T>(0.f);
  if (there) mix_row(p, static_cast<int>(tile.first) + row, p.t, kept, p.up_bias == nullptr ? nullptr : kept + weights);
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2) gated_forward_kernel(GatedForward<T> p) {
  SharedMemory memory;
  GatedTile<T> tile(memory, p.gates, kept_cols_of(p));
  tile.find(p.rows, p.x, p.base, p.gates);
  DropoutMask mask(p.dropout);
  int64_t first = tile.first;
  int ranks = p.ranks(), slots = p.gates.down.slots;
  tile.poison(p.t, slots * ranks, slots * ranks);

  gather<T, Inner::kContiguous>(
      tile, p.gates, p.gates.down, tile.down, p.features, ranks, p.by_ranks,
      [&](T* left, int k0) {
        load_tile<kTileRows, kInner<T>, kTileThreads>(
            left, p.x.data + k0, [&](int row) { return tile.in_offset[row]; },
            [&](int row) { return row < tile.count; }, p.features - k0, p.x.aligned);
      },
      [&](T* left, int k0) {
        if (!mask.drops()) return;
        change_tile<kTileRows, kInner<T>, kTileThreads>(
            left, [&](float value, int row, int col) { return mask.apply(value, first + row, k0 + col); });
      },
      [&](T* right, int k0, int col0) {
        load_matrix<GatedTile<T>::kNarrow, kInner<T>>(right, p.down, col0, p.gates.down.experts * ranks, k0, p.features,
                                                      p.down_aligned);
      },
      [&](int row, int slot, int expert, int rank, float sum) {
        if (p.down_bias != nullptr) sum += to_float(p.down_bias[static_cast<int64_t>(expert) * ranks + rank]);
        p.t[((first + row) * slots + slot) * ranks + rank] = from_float<T>(sum);
      });
  __syncthreads();
  bool in_place = mixes_in_place(p);
  for (int row = this_warp(); row < (in_place ? kTileRows : tile.count); row += kTileThreads / 32) {
    if (in_place) {
      keep_row(p, tile, row);
    } else if (tile.served[row]) {
      int64_t slot0 = (first + row) * p.gates.up.slots;
      mix_row(p, static_cast<int>(first) + row, p.t, p.mixed + slot0 * ranks,
              p.bias_gates == nullptr ? nullptr : p.bias_gates + slot0);
    }
  }
  __syncthreads();

  for (int group = 0; group < p.ranges.groups; ++group) {
    int start = p.ranges.start[group];
    bool aligned = start % Piece<T>::kSize == 0;
    spread<T, Inner::kContiguous>(
        tile, p.gates, p.gates.up, tile.up, p.mixed, ranks, group * p.rank, p.rank, p.by_rank, p.bias_gates, in_place,
        p.ranges.cols,
        [&](T* right, int col0, int expert, int experts, int k0) {
          load_up(right, p, group, col0, expert, experts, k0);
        },
        [&](int row, int col, int valid, const float* sums) {
          Piece<T> old{}, piece;
          if (p.base.data != nullptr) {
            old = load_piece(p.base.data + tile.added_offset[row] + start + col, valid, aligned && p.base.aligned);
          }
#pragma unroll
          for (int e = 0; e < Piece<T>::kSize; ++e) {
            piece.values[e] = from_float<T>(to_float(old.values[e]) + sums[e]);
          }
          store_piece(p.out + (first + row) * p.width + start + col, piece, valid, aligned && p.out_aligned);
        });
  }
  for (int gap = 0; gap < p.ranges.gaps; ++gap) copy_gap(p, tile, p.ranges.gap_start[gap], p.ranges.gap_cols[gap]);
}

#define ADAMIX_INSTANTIATE(T) template __global__ void gated_forward_kernel<T>(GatedForward<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_gated_forward(const GatedForward<T>& params, const Device& device) {
  Shape shape{dim3(count_tiles(params.rows)), kTileThreads,
              shared_bytes<GatedTile<T>>(params.gates, kept_cols_of(params))};
  launch("gated_forward", gated_forward_kernel<T>, shape, device, params);
}

template void launch_gated_forward(const GatedForward<float>&, const Device&);
template void launch_gated_forward(const GatedForward<half>&, const Device&);
template void launch_gated_forward(const GatedForward<bfloat16>&, const Device&);
#endif

}  // namespace adamix
