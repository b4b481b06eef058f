// Routed LoRA's forward for all groups and any rows: one launch, [tile, groups * r] never leaves the block. Rows of
// 16-byte pieces have a kernel of their own, routed_lora_fwd_mma.cu, where 16-bit matrices are multiplied in registers.
#include "common/routed_launch.h"
#include "routed_lora/routed_lora.h"

namespace adamix {

// Columns of the narrow result: every group's r columns start at a multiple of 16.
template <typename T>
ADAMIX_BOTH int narrow_cols(const RoutedLoraForward<T>& p) {
  return p.ranges.groups * round_up(p.rank, 16);
}

// `cols` columns of out from `start` on = those of base, or zeros, for the tile's rows.
template <typename T>
ADAMIX_DEVICE void copy_columns(const RoutedLoraForward<T>& p, const TileRows& rows, int start, int cols) {
  constexpr int kSize = Piece<T>::kSize;
  bool aligned = start % kSize == 0;
  for (int row = this_warp(); row < rows.count; row += kTileThreads / 32) {
    const T* from = p.base.data == nullptr ? nullptr : p.base.data + rows.added_offset[row] + start;
    T* to = p.out + (rows.first + row) * p.width + start;
#pragma unroll 4
    for (int col = this_lane() * kSize; col < cols; col += 32 * kSize) {
      Piece<T> piece{};
      if (from != nullptr) piece = load_piece(from + col, cols - col, aligned && p.base.aligned);
      store_piece(to + col, piece, cols - col, aligned && p.out_aligned);
    }
  }
}

template <typename T, int Narrow>
__global__ void __launch_bounds__(kTileThreads, 2) routed_lora_forward_kernel(RoutedLoraForward<T> p) {
  SharedMemory memory;
  RoutedTile<T, Narrow> tile(memory, narrow_cols(p));
  tile.rows.find(p.rows, p.x, p.base, p.a, p.b);
  tile.narrow.clear();
  DropoutMask mask(p.dropout);
  int64_t first = tile.rows.first;
  int group_pitch = round_up(p.rank, 16), ranks = p.ranges.groups * p.rank;
  tile.rows.poison(p.t, ranks, ranks);
  for (int group = 0; group < p.ranges.groups; ++group) {
    tile.rows.poison(p.out + p.ranges.start[group], p.width, p.ranges.cols);
  }

  for_each_expert(tile.rows.narrow_expert, [&](int expert) {
    const T* weight = p.lora_a + static_cast<int64_t>(expert) * ranks * p.features;
    for (int rank0 = 0; rank0 < ranks; rank0 += Narrow) {
      narrow_product<T, Narrow, Inner::kContiguous>(
          tile.stages, p.features,
          [&](T* left, int k0) { load_rows(left, tile.rows, p.x.data, k0, p.features, p.x.aligned); },
          [&](T* left, int k0) {
            if (!mask.drops()) return;
            change_tile<kTileRows, kInner<T>, kTileThreads>(
                left, [&](float value, int row, int col) { return mask.apply(value, first + row, k0 + col); });
          },
          [&](T* right, int k0) {
            load_matrix<Narrow, kInner<T>>(right, weight, rank0, ranks, k0, p.features, p.a_aligned);
          });
      visit_patch<float, Narrow>(tile.stages.patch, [&](int row, int col, const float* sums) {
        if (tile.rows.narrow_expert[row] != expert) return;
#pragma unroll 1
        for (int e = 0; e < Piece<float>::kSize && rank0 + col + e < ranks; ++e) {
          int rank = rank0 + col + e;
          T t = from_float<T>(sums[e]);
          p.t[(first + row) * ranks + rank] = t;
          tile.narrow.data[row * tile.narrow.pitch + rank / p.rank * group_pitch + rank % p.rank] = t;
        }
      });
    }
  });
  __syncthreads();

  for_each_expert(tile.rows.wide_expert, [&](int expert) {
    for (int group = 0; group < p.ranges.groups; ++group) {
      int cols = p.ranges.cols, start = p.ranges.start[group];
      bool aligned = start % Piece<T>::kSize == 0;
      const T* weight = p.lora_b + (static_cast<int64_t>(expert) * p.ranges.groups + group) * cols * p.rank;
      wide_product<T, Narrow, Inner::kContiguous>(
          tile.stages, tile.narrow.data + group * group_pitch, tile.narrow.pitch, p.rank, cols,
          [&](T* right, int col0, int k0) {
            load_matrix<kTileCols, Narrow>(right, weight, col0, cols, k0, p.rank, p.b_aligned);
          },
          [&](int col0) {
            visit_patch<T, kTileCols>(tile.stages.patch, [&](int row, int col, const float* sums) {
              int valid = cols - col0 - col;
              if (tile.rows.wide_expert[row] != expert || valid <= 0) return;
              Piece<T> old{}, piece;
              if (p.base.data != nullptr) {
                old = load_piece(p.base.data + tile.rows.added_offset[row] + start + col0 + col, valid,
                                 aligned && p.base.aligned);
              }
#pragma unroll
              for (int e = 0; e < Piece<T>::kSize; ++e) {
                piece.values[e] = from_float<T>(to_float(old.values[e]) + p.scaling * sums[e]);
              }
              store_piece(p.out + (first + row) * p.width + start + col0 + col, piece, valid, aligned && p.out_aligned);
            });
          });
    }
  });
  for (int gap = 0; gap < p.ranges.gaps; ++gap) {
    copy_columns(p, tile.rows, p.ranges.gap_start[gap], p.ranges.gap_cols[gap]);
  }
}

#define ADAMIX_INSTANTIATE(T)                                                               \
  template __global__ void routed_lora_forward_kernel<T, kSmallRank>(RoutedLoraForward<T>); \
  template __global__ void routed_lora_forward_kernel<T, kChunk<T>>(RoutedLoraForward<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_routed_lora_forward(const RoutedLoraForward<T>& params, const Device& device) {
  if constexpr (sizeof(T) == 2) {
    if (launch_routed_lora_forward_mma(params, device)) return;
  }
  dispatch_narrow<T>(params.ranges.groups * params.rank, [&](auto narrow) {
    constexpr int kNarrow = decltype(narrow)::value;
    launch_tiles<T, kNarrow>("routed_lora_forward", routed_lora_forward_kernel<T, kNarrow>, narrow_cols(params), device,
                             params);
  });
}

template void launch_routed_lora_forward(const RoutedLoraForward<float>&, const Device&);
template void launch_routed_lora_forward(const RoutedLoraForward<half>&, const Device&);
template void launch_routed_lora_forward(const RoutedLoraForward<bfloat16>&, const Device&);
#endif

}  // namespace adamix
