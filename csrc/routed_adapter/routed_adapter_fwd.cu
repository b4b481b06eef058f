// The routed adapter's forward: one launch, [tile, r] never leaves the block.
#include "common/routed_tile.h"
#include "routed_adapter/routed_adapter.h"

namespace adamix {

template <typename T, int Narrow>
struct ForwardTile {
  Stages<T, Narrow> stages;
  T* hidden;  // [kTileRows, rank rounded up to Narrow]: act(pre)
  int64_t* x_offset;
  int64_t* residual_offset;
  int* down_expert;
  int* up_expert;

  template <typename Memory>
  ADAMIX_BOTH ForwardTile(Memory& memory, int hidden_pitch) : stages(memory) {
    hidden = memory.template take<T>(kTileRows * hidden_pitch);
    x_offset = memory.template take<int64_t>(kTileRows);
    residual_offset = memory.template take<int64_t>(kTileRows);
    down_expert = memory.template take<int>(kTileRows);
    up_expert = memory.template take<int>(kTileRows);
  }
};

template <typename T, int Narrow>
__global__ void __launch_bounds__(kTileThreads, 2) routed_adapter_forward_kernel(RoutedAdapterForward<T> p) {
  SharedMemory memory;
  int hidden_pitch = pitch_of<T>(ceil_div(p.rank, Narrow) * Narrow);
  ForwardTile<T, Narrow> tile(memory, hidden_pitch);
  int64_t first = static_cast<int64_t>(blockIdx.x) * kTileRows;
  int count = p.rows - first < kTileRows ? static_cast<int>(p.rows - first) : kTileRows;

  for (int row = threadIdx.x; row < kTileRows; row += kTileThreads) {
    bool inside = row < count;
    tile.x_offset[row] = inside ? p.x.offset(first + row) : 0;
    tile.residual_offset[row] = inside && p.residual.data != nullptr ? p.residual.offset(first + row) : 0;
    tile.down_expert[row] = inside ? p.down.expert(first + row) : kNoExpert;
    tile.up_expert[row] = inside ? p.up.expert(first + row) : kNoExpert;
  }
  __syncthreads();

  for (int expert = next_expert<kTileRows>(tile.down_expert, -1); expert != kNoExpert;
       expert = next_expert<kTileRows>(tile.down_expert, expert)) {
    const T* weight = p.down_weight + static_cast<int64_t>(expert) * p.rank * p.hidden;
    for (int rank0 = 0; rank0 < p.rank; rank0 += Narrow) {
      narrow_product<T, Narrow, Inner::kContiguous>(
          tile.stages, p.hidden,
          [&](T* left, int k0) {
            load_tile<kTileRows, kInner<T>, kTileThreads>(
                left, p.x.data + k0, [&](int row) { return tile.x_offset[row]; },
                [&](int row) { return row < count; }, p.hidden - k0, p.x.aligned);
          },
          [](T*, int) {},
          [&](T* right, int k0) {
            load_tile<Narrow, kInner<T>, kTileThreads>(
                right, weight + k0, [&](int n) { return static_cast<int64_t>(rank0 + n) * p.hidden; },
                [&](int n) { return rank0 + n < p.rank; }, p.hidden - k0, p.down_aligned);
          });
      visit_patch<float, Narrow>(tile.stages.patch, [&](int row, int col, const float* sums) {
        if (tile.down_expert[row] != expert && row < count) return;
#pragma unroll 1
        for (int e = 0; e < Piece<float>::kSize; ++e) {
          int rank = rank0 + col + e;
          T activated = from_float<T>(0.f);
          if (row < count && rank < p.rank) {
            float bias = p.down_bias == nullptr ? 0.f : to_float(p.down_bias[expert * p.rank + rank]);
            T pre = from_float<T>(sums[e] + bias);
            p.pre[(first + row) * p.rank + rank] = pre;
            activated = from_float<T>(activate(p.activation, to_float(pre)));
          }
          tile.hidden[row * hidden_pitch + rank] = activated;
        }
      });
    }
  }
  __syncthreads();

  for (int expert = next_expert<kTileRows>(tile.up_expert, -1); expert != kNoExpert;
       expert = next_expert<kTileRows>(tile.up_expert, expert)) {
    const T* weight = p.up_weight + static_cast<int64_t>(expert) * p.out_features * p.rank;
    const T* bias = p.up_bias == nullptr ? nullptr : p.up_bias + static_cast<int64_t>(expert) * p.out_features;
    wide_product<T, Narrow, Inner::kContiguous>(
        tile.stages, tile.hidden, hidden_pitch, p.rank, p.out_features,
        [&](T* right, int col0, int k0) {
          load_tile<kTileCols, Narrow, kTileThreads>(
              right, weight + k0, [&](int n) { return static_cast<int64_t>(col0 + n) * p.rank; },
              [&](int n) { return col0 + n < p.out_features; }, p.rank - k0, p.up_aligned);
        },
        [&](int col0) {
          visit_patch<T, kTileCols>(tile.stages.patch, [&](int row, int col, const float* sums) {
            int valid = p.out_features - col0 - col;
            if (tile.up_expert[row] != expert || valid <= 0) return;
            Piece<T> old{}, piece;
            if (p.residual.data != nullptr) {
              old = load_piece(p.residual.data + tile.residual_offset[row] + col0 + col, valid, p.residual.aligned);
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
  }
}

#define ADAMIX_INSTANTIATE(T)                                                             \
  template __global__ void routed_adapter_forward_kernel<T, 16>(RoutedAdapterForward<T>); \
  template __global__ void routed_adapter_forward_kernel<T, 64>(RoutedAdapterForward<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T, int Narrow>
static void launch_forward(const RoutedAdapterForward<T>& params, const Device& device) {
  int pitch = pitch_of<T>(ceil_div(params.rank, Narrow) * Narrow);
  Shape shape{dim3(static_cast<unsigned>((params.rows + kTileRows - 1) / kTileRows)), kTileThreads,
              shared_bytes<ForwardTile<T, Narrow>>(pitch)};
  launch("routed_adapter_forward", routed_adapter_forward_kernel<T, Narrow>, shape, device, params);
}

template <typename T>
void launch_routed_adapter_forward(const RoutedAdapterForward<T>& params, const Device& device) {
  if (params.rank <= 16) {
    launch_forward<T, 16>(params, device);
  } else {
    launch_forward<T, 64>(params, device);
  }
}

template void launch_routed_adapter_forward(const RoutedAdapterForward<float>&, const Device&);
template void launch_routed_adapter_forward(const RoutedAdapterForward<half>&, const Device&);
template void launch_routed_adapter_forward(const RoutedAdapterForward<bfloat16>&, const Device&);
#endif

}  // namespace adamix
