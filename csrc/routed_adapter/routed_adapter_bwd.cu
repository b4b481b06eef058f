// The routed adapter's backward: the input's gradient in one launch, both sides' weight gradients in another.
#include "common/routed_launch.h"
#include "routed_adapter/resident_bwd.h"
#include "routed_adapter/resident_launch.h"
#include "routed_adapter/routed_adapter.h"

namespace adamix {

template <typename T, int Narrow>
__global__ void __launch_bounds__(kTileThreads, 2) routed_adapter_input_grad_kernel(RoutedAdapterInputGrad<T> p) {
  SharedMemory memory;
  RoutedTile<T, Narrow> tile(memory, p.rank);
  if (p.dpre == nullptr && p.dx == nullptr) {
    int64_t from = static_cast<int64_t>(blockIdx.x) * kTileRows * p.rank, to = from + kTileRows * p.rank;
    if (to > p.rows * p.rank) to = p.rows * p.rank;
    for (int64_t at = from + threadIdx.x; at < to; at += kTileThreads) {
      p.h[at] = from_float<T>(activate(p.activation, to_float(p.pre[at])));
    }
    return;
  }
  tile.rows.find(p.rows, p.grad_out, p.grad_out, p.up, p.down);
  tile.narrow.clear();
  if (p.dx != nullptr) tile.rows.poison(p.dx, p.hidden, p.hidden);
  int64_t first = tile.rows.first;

  for_each_expert(tile.rows.narrow_expert, [&](int expert) {
    const T* weight = p.up_weight + static_cast<int64_t>(expert) * p.out_features * p.rank;
    for (int rank0 = 0; rank0 < p.rank; rank0 += Narrow) {
      narrow_product<T, Narrow, Inner::kStrided>(
          tile.stages, p.out_features,
          [&](T* left, int k0) { load_rows(left, tile.rows, p.grad_out.data, k0, p.out_features, p.grad_out.aligned); },
          [](T*, int) {},
          [&](T* right, int k0) {
            load_matrix<kInner<T>, Narrow>(right, weight, k0, p.out_features, rank0, p.rank, p.up_aligned);
          });
      visit_patch<float, Narrow>(tile.stages.patch, [&](int row, int col, const float* sums) {
        if (tile.rows.narrow_expert[row] != expert) return;
#pragma unroll 1
        for (int e = 0; e < Piece<float>::kSize && rank0 + col + e < p.rank; ++e) {
          int rank = rank0 + col + e;
          int64_t at = (first + row) * p.rank + rank;
          float pre = to_float(p.pre[at]);
          T dpre = from_float<T>(sums[e] * activation_slope(p.activation, pre));
          if (p.dpre != nullptr) p.dpre[at] = dpre;
          if (p.h != nullptr) p.h[at] = from_float<T>(activate(p.activation, pre));
          tile.narrow.data[row * tile.narrow.pitch + rank] = dpre;
        }
      });
    }
  });
  if (p.dx == nullptr) return;
  __syncthreads();

  for_each_expert(tile.rows.wide_expert, [&](int expert) {
    const T* weight = p.down_weight + static_cast<int64_t>(expert) * p.rank * p.hidden;
    wide_product<T, Narrow, Inner::kStrided>(
        tile.stages, tile.narrow.data, tile.narrow.pitch, p.rank, p.hidden,
        [&](T* right, int col0, int k0) {
          load_matrix<Narrow, kTileCols>(right, weight, k0, p.rank, col0, p.hidden, p.down_aligned);
        },
        [&](int col0) {
          visit_patch<T, kTileCols>(tile.stages.patch, [&](int row, int col, const float* sums) {
            int valid = p.hidden - col0 - col;
            if (tile.rows.wide_expert[row] != expert || valid <= 0) return;
            Piece<T> added{}, piece;
            if (p.add_input) {
              added = load_piece(p.grad_out.data + tile.rows.added_offset[row] + col0 + col, valid, p.grad_out.aligned);
            }
#pragma unroll
            for (int e = 0; e < Piece<T>::kSize; ++e) {
              piece.values[e] = from_float<T>(p.add_input ? sums[e] + to_float(added.values[e]) : sums[e]);
            }
            store_piece(p.dx + (first + row) * p.hidden + col0 + col, piece, valid, p.dx_aligned);
          });
        });
  });
}

template <typename T, int Narrow>
__global__ void __launch_bounds__(kTileThreads, 2) routed_adapter_weight_grad_kernel(RoutedAdapterWeightGrad<T> p) {
  SharedMemory memory;
  GradTile<T, Narrow> tile(memory);
  int number = blockIdx.x, down_jobs = p.down.experts * blocks_an_expert(p.down, Narrow);
  GradSide<T> side = p.down;
  if (number >= down_jobs) {
    side = p.up;
    number -= down_jobs;
  }
  weight_grad(tile, side, job_of<T, Narrow>(side, number), p.shares, 1.f, [](T*, auto) {}, [](T*) {});
}

#define ADAMIX_INSTANTIATE(T)                                                                            \
  template __global__ void routed_adapter_input_grad_kernel<T, kSmallRank>(RoutedAdapterInputGrad<T>);   \
  template __global__ void routed_adapter_input_grad_kernel<T, kChunk<T>>(RoutedAdapterInputGrad<T>);    \
  template __global__ void routed_adapter_weight_grad_kernel<T, kSmallRank>(RoutedAdapterWeightGrad<T>); \
  template __global__ void routed_adapter_weight_grad_kernel<T, kChunk<T>>(RoutedAdapterWeightGrad<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#define ADAMIX_INSTANTIATE(T, Groups, Chunks, Steps) \
  template __global__ void routed_adapter_resident_input_grad_kernel<T, Groups, Chunks, Steps>(ResidentInputGrad<T>);
ADAMIX_RESIDENT_SHAPES(ADAMIX_INSTANTIATE, half)
ADAMIX_RESIDENT_SHAPES(ADAMIX_INSTANTIATE, bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
bool launch_resident_input_grad(const ResidentInputGrad<T>& params, const Device& device) {
  bool aligned = params.grad_out.aligned && params.down_aligned && is_multiple(params.up_weight, 8) &&
                 is_multiple(params.pre, 4) && (params.dx == nullptr || params.dx_aligned);
  if (!aligned || params.hidden != params.out_features || (params.dpre == nullptr && params.dx == nullptr)) {
    return false;
  }
  ResidentShape shape = resident_shape<T>(params.rows, params.hidden, params.rank, device);
  if (shape.groups == 0) return false;
  dispatch_resident(shape, [&](auto groups, auto chunks, auto steps) {
    constexpr int kGroups = decltype(groups)::value, kChunks = decltype(chunks)::value;
    launch_resident<T, kGroups>("routed_adapter_input_grad",
                                routed_adapter_resident_input_grad_kernel<T, kGroups, kChunks, decltype(steps)::value>,
                                shape, params.rows, params.hidden, params.rank, device, params);
  });
  return true;
}

template bool launch_resident_input_grad(const ResidentInputGrad<half>&, const Device&);
template bool launch_resident_input_grad(const ResidentInputGrad<bfloat16>&, const Device&);

template <typename T>
void launch_routed_adapter_input_grad(const RoutedAdapterInputGrad<T>& params, const Device& device) {
  if constexpr (kFragmentsFrom<T> > 0) {
    if (launch_resident_input_grad(ResidentInputGrad<T>{params, 1.f}, device)) return;
  }
  dispatch_narrow<T>(params.rank, [&](auto narrow) {
    constexpr int kNarrow = decltype(narrow)::value;
    launch_tiles<T, kNarrow>("routed_adapter_input_grad", routed_adapter_input_grad_kernel<T, kNarrow>, params.rank,
                             device, params);
  });
}

template <typename T>
void launch_routed_adapter_weight_grad(const RoutedAdapterWeightGrad<T>& params, const Device& device) {
  dispatch_narrow<T>(params.down.ranks, [&](auto narrow) {
    constexpr int kNarrow = decltype(narrow)::value;
    launch_weight_grad<T, kNarrow>("routed_adapter_weight_grad", routed_adapter_weight_grad_kernel<T, kNarrow>,
                                   params.down, params.up, device, params);
  });
}

#define ADAMIX_INSTANTIATE(T)                                                                      \
  template void launch_routed_adapter_input_grad(const RoutedAdapterInputGrad<T>&, const Device&); \
  template void launch_routed_adapter_weight_grad(const RoutedAdapterWeightGrad<T>&, const Device&);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE
#endif

}  // namespace adamix
