// Routed LoRA's backward for any rows: the input's gradient in one launch, both sides' weight gradients in another.
// Rows of 16-byte pieces have kernels of their own, routed_lora_dx_mma.cu and routed_lora_grads_mma.cu.
#include "common/routed_launch.h"
#include "routed_adapter/resident_input_grad.h"
#include "routed_lora/routed_lora.h"

namespace adamix {

template <typename T, int Narrow>
__global__ void __launch_bounds__(kTileThreads, 2) routed_lora_input_grad_kernel(RoutedLoraInputGrad<T> p) {
  SharedMemory memory;
  int ranks = p.ranges.groups * p.rank;
  RoutedTile<T, Narrow> tile(memory, ranks);
  tile.rows.find(p.rows, p.grad_out, Rows<const T>{nullptr, 0, 0, {}, false}, p.b, p.a);
  tile.narrow.clear();
  if (p.dx != nullptr) tile.rows.poison(p.dx, p.features, p.features);
  DropoutMask mask(p.dropout);
  int64_t first = tile.rows.first;

  for_each_expert(tile.rows.narrow_expert, [&](int expert) {
    for (int group = 0; group < p.ranges.groups; ++group) {
      int cols = p.ranges.cols, start = p.ranges.start[group];
      bool aligned = p.grad_out.aligned && start % Piece<T>::kSize == 0;
      const T* weight = p.lora_b + (static_cast<int64_t>(expert) * p.ranges.groups + group) * cols * p.rank;
      for (int rank0 = 0; rank0 < p.rank; rank0 += Narrow) {
        narrow_product<T, Narrow, Inner::kStrided>(
            tile.stages, cols,
            [&](T* left, int k0) { load_rows(left, tile.rows, p.grad_out.data + start, k0, cols, aligned); },
            [](T*, int) {},
            [&](T* right, int k0) {
              load_matrix<kInner<T>, Narrow>(right, weight, k0, cols, rank0, p.rank, p.b_aligned);
            });
        visit_patch<float, Narrow>(tile.stages.patch, [&](int row, int col, const float* sums) {
          if (tile.rows.narrow_expert[row] != expert) return;
#pragma unroll 1
          for (int e = 0; e < Piece<float>::kSize && rank0 + col + e < p.rank; ++e) {
            int rank = group * p.rank + rank0 + col + e;
            T dt = from_float<T>(p.scaling * sums[e]);
            if (p.dt != nullptr) p.dt[(first + row) * ranks + rank] = dt;
            tile.narrow.data[row * tile.narrow.pitch + rank] = dt;
          }
        });
      }
    }
  });
  if (p.dx == nullptr) return;
  __syncthreads();

  for_each_expert(tile.rows.wide_expert, [&](int expert) {
    const T* weight = p.lora_a + static_cast<int64_t>(expert) * ranks * p.features;
    wide_product<T, Narrow, Inner::kStrided>(
        tile.stages, tile.narrow.data, tile.narrow.pitch, ranks, p.features,
        [&](T* right, int col0, int k0) {
          load_matrix<Narrow, kTileCols>(right, weight, k0, ranks, col0, p.features, p.a_aligned);
        },
        [&](int col0) {
          visit_patch<T, kTileCols>(tile.stages.patch, [&](int row, int col, const float* sums) {
            int valid = p.features - col0 - col;
            if (tile.rows.wide_expert[row] != expert || valid <= 0) return;
            Piece<T> piece;
#pragma unroll
            for (int e = 0; e < Piece<T>::kSize; ++e) {
              float value = mask.drops() ? mask.apply(sums[e], first + row, col0 + col + e) : sums[e];
              piece.values[e] = from_float<T>(value);
            }
            store_piece(p.dx + (first + row) * p.features + col0 + col, piece, valid, p.dx_aligned);
          });
        });
  });
}

template <typename T, int Narrow>
__global__ void __launch_bounds__(kTileThreads, 2) routed_lora_weight_grad_kernel(RoutedLoraWeightGrad<T> p) {
  SharedMemory memory;
  GradTile<T, Narrow> tile(memory);
  DropoutMask mask(p.dropout);
  int number = blockIdx.x, a_jobs = p.a.experts * blocks_an_expert(p.a, Narrow);
  bool is_b = number >= a_jobs;
  GradSide<T> side = p.a;
  if (is_b) {
    side = p.b;
    number -= a_jobs;
  }
  GradJob job = job_of<T, Narrow>(side, number);
  if (is_b) {
    int start = p.ranges.start[job.group];
    side.wide.data += start;
    side.wide.aligned = side.wide.aligned && start % Piece<T>::kSize == 0;
  }
  weight_grad(
      tile, side, job, p.shares, is_b ? p.scaling : 1.f,
      [&](T* wide, auto row_of) {
        if (is_b || !mask.drops()) return;
        change_tile<kInner<T>, kTileCols, kTileThreads>(
            wide, [&](float value, int row, int col) { return mask.apply(value, row_of(row), job.col0 + col); });
      },
      [](T*) {});
}

#define ADAMIX_INSTANTIATE(T)                                                                      \
  template __global__ void routed_lora_input_grad_kernel<T, kSmallRank>(RoutedLoraInputGrad<T>);   \
  template __global__ void routed_lora_input_grad_kernel<T, kChunk<T>>(RoutedLoraInputGrad<T>);    \
  template __global__ void routed_lora_weight_grad_kernel<T, kSmallRank>(RoutedLoraWeightGrad<T>); \
  template __global__ void routed_lora_weight_grad_kernel<T, kChunk<T>>(RoutedLoraWeightGrad<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
namespace {

// Many ranks and no dropout: as an adapter without activation, whose blocks read each weight once, not once a warp.
// Below sm_90 the tile is loaded too little at a time, and half as many blocks leave some multiprocessors with twice
// the rows.
template <typename T>
bool launch_as_adapter(const RoutedLoraInputGrad<T>& p, const Device& device) {
  bool dropped = p.dropout.seed != nullptr;
  if (device.capability < 90 || p.ranges.groups != 1 || p.rank <= kFragmentRanks || dropped) return false;
  ResidentInputGrad<T> params{};
  params.grad_out = p.grad_out;
  params.grad_out.data += p.ranges.start[0];
  params.grad_out.aligned = p.grad_out.aligned && p.ranges.start[0] % Piece<T>::kSize == 0;
  params.down_weight = p.lora_a, params.up_weight = p.lora_b;
  params.dpre = p.dt, params.dx = p.dx;
  params.down = p.a, params.up = p.b;
  params.rows = p.rows;
  params.hidden = p.features, params.rank = p.rank, params.out_features = p.ranges.cols;
  params.scaling = p.scaling;
  params.activation = Activation::kNone;
  params.down_aligned = p.a_aligned, params.dx_aligned = p.dx_aligned;
  return launch_resident_input_grad(params, device);
}

}  // namespace

template <typename T>
void launch_routed_lora_input_grad(const RoutedLoraInputGrad<T>& params, const Device& device) {
  if constexpr (sizeof(T) == 2) {
    if (launch_as_adapter(params, device) || launch_routed_lora_input_grad_mma(params, device)) return;
  }
  int ranks = params.ranges.groups * params.rank;
  dispatch_narrow<T>(ranks, [&](auto narrow) {
    constexpr int kNarrow = decltype(narrow)::value;
    launch_tiles<T, kNarrow>("routed_lora_input_grad", routed_lora_input_grad_kernel<T, kNarrow>, ranks, device,
                             params);
  });
}

template <typename T>
void launch_routed_lora_weight_grad(const RoutedLoraWeightGrad<T>& params, const Device& device) {
  if constexpr (sizeof(T) == 2) {
    if (params.tiles > 0) return launch_routed_lora_weight_grad_mma(params, device);
  }
  dispatch_narrow<T>(params.a.ranks, [&](auto narrow) {
    constexpr int kNarrow = decltype(narrow)::value;
    launch_weight_grad<T, kNarrow>("routed_lora_weight_grad", routed_lora_weight_grad_kernel<T, kNarrow>, params.a,
                                   params.b, device, params);
  });
}

#define ADAMIX_INSTANTIATE(T)                                                                \
  template void launch_routed_lora_input_grad(const RoutedLoraInputGrad<T>&, const Device&); \
  template void launch_routed_lora_weight_grad(const RoutedLoraWeightGrad<T>&, const Device&);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE
#endif

}  // namespace adamix
