// The routed adapter's forward: one launch, [tile, r] never leaves the block.
#include "common/routed_launch.h"
#include "routed_adapter/held_fwd.h"
#include "routed_adapter/resident_fwd.h"
#include "routed_adapter/resident_launch.h"
#include "routed_adapter/routed_adapter.h"

namespace adamix {

template <typename T, int Narrow>
__global__ void __launch_bounds__(kTileThreads, 2) routed_adapter_forward_kernel(RoutedAdapterForward<T> p) {
  SharedMemory memory;
  RoutedTile<T, Narrow> tile(memory, p.rank);
  tile.rows.find(p.rows, p.x, p.residual, p.down, p.up);
  tile.narrow.clear();
  tile.rows.poison(p.pre, p.rank, p.rank);
  tile.rows.poison(p.out, p.out_features, p.out_features);
  int64_t first = tile.rows.first;

  for_each_expert(tile.rows.narrow_expert, [&](int expert) {
    const T* weight = p.down_weight + static_cast<int64_t>(expert) * p.rank * p.hidden;
    for (int rank0 = 0; rank0 < p.rank; rank0 += Narrow) {
      narrow_product<T, Narrow, Inner::kContiguous>(
          tile.stages, p.hidden,
          [&](T* left, int k0) { load_rows(left, tile.rows, p.x.data, k0, p.hidden, p.x.aligned); }, [](T*, int) {},
          [&](T* right, int k0) {
            load_matrix<Narrow, kInner<T>>(right, weight, rank0, p.rank, k0, p.hidden, p.down_aligned);
          });
      visit_patch<float, Narrow>(tile.stages.patch, [&](int row, int col, const float* sums) {
        if (tile.rows.narrow_expert[row] != expert) return;
#pragma unroll 1
        for (int e = 0; e < Piece<float>::kSize && rank0 + col + e < p.rank; ++e) {
          int rank = rank0 + col + e;
          float bias = p.down_bias == nullptr ? 0.f : to_float(p.down_bias[expert * p.rank + rank]);
          T pre = from_float<T>(sums[e] + bias);
          p.pre[(first + row) * p.rank + rank] = pre;
          tile.narrow.data[row * tile.narrow.pitch + rank] = from_float<T>(activate(p.activation, to_float(pre)));
        }
      });
    }
  });
  __syncthreads();

  for_each_expert(tile.rows.wide_expert, [&](int expert) {
    const T* weight = p.up_weight + static_cast<int64_t>(expert) * p.out_features * p.rank;
    const T* bias = p.up_bias == nullptr ? nullptr : p.up_bias + static_cast<int64_t>(expert) * p.out_features;
    wide_product<T, Narrow, Inner::kContiguous>(
        tile.stages, tile.narrow.data, tile.narrow.pitch, p.rank, p.out_features,
        [&](T* right, int col0, int k0) {
          load_matrix<kTileCols, Narrow>(right, weight, col0, p.out_features, k0, p.rank, p.up_aligned);
        },
        [&](int col0) {
          visit_patch<T, kTileCols>(tile.stages.patch, [&](int row, int col, const float* sums) {
            int valid = p.out_features - col0 - col;
            if (tile.rows.wide_expert[row] != expert || valid <= 0) return;
            Piece<T> old{}, piece;
            if (p.residual.data != nullptr) {
              old = load_piece(p.residual.data + tile.rows.added_offset[row] + col0 + col, valid, p.residual.aligned);
            }
#pragma unroll
            for (int e = 0; e < Piece<T>::kSize; ++e) {
              float value = sums[e];
              if (bias != nullptr && e < valid) value += to_float(bias[col0 + col + e]);
              if (p.residual.data != nullptr) value += to_float(old.values[e]);
              piece.values[e] = from_float<T>(value);
            }
            store_piece(p.out + (first + row) * p.out_features + col0 + col, piece, valid, p.out_aligned);
          });
        });
  });
}

#define ADAMIX_INSTANTIATE(T)                                                                     \
  template __global__ void routed_adapter_forward_kernel<T, kSmallRank>(RoutedAdapterForward<T>); \
  template __global__ void routed_adapter_forward_kernel<T, kChunk<T>>(RoutedAdapterForward<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#define ADAMIX_INSTANTIATE(T, Groups, Chunks, Steps) \
  template __global__ void routed_adapter_resident_forward_kernel<T, Groups, Chunks, Steps>(RoutedAdapterForward<T>);
ADAMIX_RESIDENT_SHAPES(ADAMIX_INSTANTIATE, half)
ADAMIX_RESIDENT_SHAPES(ADAMIX_INSTANTIATE, bfloat16)
#undef ADAMIX_INSTANTIATE

template __global__ void routed_adapter_held_forward_kernel<half>(RoutedAdapterForward<half>);

#if defined(ADAMIX_LAUNCHERS)
// The tile that stays in shared memory, where one can; whether it was launched.
template <typename T>
bool launch_held_forward(const RoutedAdapterForward<T>& params, const Device& device) {
  if constexpr (kIsHalf<T>) {
    size_t bytes = shared_bytes<HeldMemory<T>>(params.hidden, params.rank);
    if (device.capability >= kFragmentsFrom<T> || bytes > static_cast<size_t>(device.shared_bytes)) return false;
    if (!params.up_aligned || params.hidden % 16 != 0 || params.rank == 0) return false;
    launch("routed_adapter_held_forward", routed_adapter_held_forward_kernel<T>,
           {dim3(static_cast<unsigned>((params.rows + kHeldRows - 1) / kHeldRows)), 32 * kHeldWarps, bytes}, device,
           params);
    return true;
  }
  return false;
}

// The tile that stays in registers, where one can; whether it was launched.
template <typename T>
bool launch_resident_forward(const RoutedAdapterForward<T>& params, const Device& device) {
  if constexpr (kFragmentsFrom<T> > 0) {
    bool aligned = params.x.aligned && params.down_aligned && params.out_aligned &&
                   (params.residual.data == nullptr || params.residual.aligned) && is_multiple(params.up_weight, 8) &&
                   (params.up_bias == nullptr || is_multiple(params.up_bias, 16));
    if (!aligned || params.hidden != params.out_features) return false;
    if (launch_held_forward(params, device)) return true;
    ResidentShape shape = resident_shape<T>(params.rows, params.hidden, params.rank, device);
    if (shape.groups == 0) return false;
    dispatch_resident(shape, [&](auto groups, auto chunks, auto steps) {
      constexpr int kGroups = decltype(groups)::value, kChunks = decltype(chunks)::value;
      launch_resident<T, kGroups>("routed_adapter_forward",
                                  routed_adapter_resident_forward_kernel<T, kGroups, kChunks, decltype(steps)::value>,
                                  shape, params.rows, params.hidden, params.rank, device, params);
    });
    return true;
  }
  return false;
}

template <typename T>
void launch_routed_adapter_forward(const RoutedAdapterForward<T>& params, const Device& device) {
  if (launch_resident_forward(params, device)) return;
  dispatch_narrow<T>(params.rank, [&](auto narrow) {
    constexpr int kNarrow = decltype(narrow)::value;
    launch_tiles<T, kNarrow>("routed_adapter_forward", routed_adapter_forward_kernel<T, kNarrow>, params.rank, device,
                             params);
  });
}

template void launch_routed_adapter_forward(const RoutedAdapterForward<float>&, const Device&);
template void launch_routed_adapter_forward(const RoutedAdapterForward<half>&, const Device&);
template void launch_routed_adapter_forward(const RoutedAdapterForward<bfloat16>&, const Device&);
#endif

}  // namespace adamix
