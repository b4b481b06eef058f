// LoRA factors folded into a weight: the weight is read once and written once, in one rounding.
#include "common/piece.h"
#include "merge/merge.h"
#include "merge/shares.h"

namespace adamix {

constexpr int kLoraRows = 32, kLoraCols = 128;  // a block's tile of the weight
constexpr int kLoraRank = 16;                   // ranks at a time
constexpr int kLoraLeftPitch = kLoraRank + 1;

template <typename Wide>
struct LoraTile {
  Wide* left;   // [kLoraRows, kLoraRank]: B of the rows' outputs, or A of the rows' inputs
  Wide* right;  // [kLoraRank, kLoraCols]

  template <typename Memory>
  ADAMIX_BOTH explicit LoraTile(Memory& memory) {
    left = memory.template take<Wide>(kLoraRows * kLoraLeftPitch);
    right = memory.template take<Wide>(kLoraRank * kLoraCols);
  }
};

// The mean over the experts of element `at` of a factor.
template <typename Wide>
ADAMIX_DEVICE Wide mean_of(const void* factor, Kind kind, int experts, int64_t stride, int64_t at) {
  Wide sum = load_scalar<Wide>(factor, kind, at);
  for (int m = 1; m < experts; ++m) sum += load_scalar<Wide>(factor, kind, m * stride + at);
  return experts == 1 ? sum : sum / Wide(experts);
}

// Elements of mean(A_g) [r, K] and mean(B_g) [Ng, r]; 0 outside.
template <typename T, typename Wide>
ADAMIX_DEVICE Wide lora_a(const MergeLora<T>& p, int group, int rank, int k) {
  if (rank >= p.rank || k >= p.features) return Wide(0);
  int64_t rows = static_cast<int64_t>(p.groups) * p.rank;
  int64_t row = static_cast<int64_t>(p.first_group + group) * p.rank + rank;
  return mean_of<Wide>(p.lora_a, p.kind, p.a_experts, rows * p.features, row * p.features + k);
}

template <typename T, typename Wide>
ADAMIX_DEVICE Wide lora_b(const MergeLora<T>& p, int group, int n, int rank) {
  int j = n - p.offsets[group];
  if (rank >= p.rank || j < 0 || j >= p.per_group) return Wide(0);
  int64_t rows = static_cast<int64_t>(p.groups) * p.per_group;
  int64_t row = static_cast<int64_t>(p.first_group + group) * p.per_group + j;
  return mean_of<Wide>(p.lora_b, p.kind, p.b_experts, rows * p.rank, row * p.rank + rank);
}

template <typename T, typename Wide>
ADAMIX_DEVICE void load_factors(const MergeLora<T>& p, const LoraTile<Wide>& tile, int group, int row0, int col0,
                                int rank0) {
  for (int i = threadIdx.x; i < kLoraRows * kLoraRank; i += kMergeThreads) {
    // Neighbouring threads read neighbouring elements: B is contiguous along the rank, A along the features.
    int row = p.fan_in_fan_out ? i % kLoraRows : i / kLoraRank;
    int c = p.fan_in_fan_out ? i / kLoraRows : i % kLoraRank;
    tile.left[row * kLoraLeftPitch + c] = p.fan_in_fan_out ? lora_a<T, Wide>(p, group, rank0 + c, row0 + row)
                                                           : lora_b<T, Wide>(p, group, row0 + row, rank0 + c);
  }
  for (int i = threadIdx.x; i < kLoraRank * kLoraCols; i += kMergeThreads) {
    int col = p.fan_in_fan_out ? i / kLoraRank : i % kLoraCols;
    int c = p.fan_in_fan_out ? i % kLoraRank : i / kLoraCols;
    tile.right[c * kLoraCols + col] = p.fan_in_fan_out ? lora_b<T, Wide>(p, group, col0 + col, rank0 + c)
                                                       : lora_a<T, Wide>(p, group, rank0 + c, col0 + col);
  }
}

template <typename T, typename Wide>
__global__ void __launch_bounds__(kMergeThreads, 2) merge_lora_kernel(MergeLora<T> p) {
  constexpr int kSize = Piece<T>::kSize;
  constexpr int kRowPieces = kLoraCols / kSize;
  constexpr int kStep = kMergeThreads / kRowPieces;
  constexpr int kCount = kLoraRows / kStep;
  SharedMemory memory;
  LoraTile<Wide> tile(memory);
  int row0 = blockIdx.y * kLoraRows, col0 = blockIdx.x * kLoraCols;
  int first = threadIdx.x / kRowPieces, col = threadIdx.x % kRowPieces * kSize;
  int valid = p.width - col0 - col;

  Piece<T> values[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    int row = row0 + first + i * kStep;
    if (row < p.height && valid > 0) {
      values[i] = load_piece(p.weight + static_cast<int64_t>(row) * p.width + col0 + col, valid, p.aligned);
    }
  }
  int begin = p.fan_in_fan_out ? col0 : row0, end = begin + (p.fan_in_fan_out ? kLoraCols : kLoraRows);
  for (int group = 0; group < p.here; ++group) {
    if (p.offsets[group] >= end || p.offsets[group] + p.per_group <= begin) continue;
    Wide sums[kCount][kSize] = {};
    for (int rank0 = 0; rank0 < p.rank; rank0 += kLoraRank) {
      __syncthreads();
      load_factors(p, tile, group, row0, col0, rank0);
      __syncthreads();
#pragma unroll 1
      for (int c = 0; c < kLoraRank; ++c) {
        Wide right[kSize];
#pragma unroll
        for (int e = 0; e < kSize; ++e) right[e] = tile.right[c * kLoraCols + col + e];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          Wide left = tile.left[(first + i * kStep) * kLoraLeftPitch + c];
#pragma unroll
          for (int e = 0; e < kSize; ++e) sums[i][e] = multiply_add(left, right[e], sums[i][e]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        int j = (p.fan_in_fan_out ? col0 + col + e : row0 + first + i * kStep) - p.offsets[group];
        // What the group does not touch keeps its bits.
        if (j < 0 || j >= p.per_group) continue;
        Wide sum = multiply_add(Wide(p.scaling), sums[i][e], Wide(to_float(values[i].values[e])));
        values[i].values[e] = from_float<T>(static_cast<float>(sum));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    int row = row0 + first + i * kStep;
    if (row < p.height && valid > 0) {
      store_piece(p.out + static_cast<int64_t>(row) * p.width + col0 + col, values[i], valid, p.aligned);
    }
  }
}

#define ADAMIX_INSTANTIATE(T)                                         \
  template __global__ void merge_lora_kernel<T, float>(MergeLora<T>); \
  template __global__ void merge_lora_kernel<T, double>(MergeLora<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_merge_lora(const MergeLora<T>& params, bool wide, const Device& device) {
  auto tiles = [](int size, int tile) { return static_cast<unsigned>((static_cast<int64_t>(size) + tile - 1) / tile); };
  Shape shape{dim3(tiles(params.width, kLoraCols), tiles(params.height, kLoraRows)), kMergeThreads,
              wide ? shared_bytes<LoraTile<double>>() : shared_bytes<LoraTile<float>>()};
  launch("merge_lora", wide ? merge_lora_kernel<T, double> : merge_lora_kernel<T, float>, shape, device, params);
}

template void launch_merge_lora(const MergeLora<float>&, bool, const Device&);
template void launch_merge_lora(const MergeLora<half>&, bool, const Device&);
template void launch_merge_lora(const MergeLora<bfloat16>&, bool, const Device&);
#endif

}  // namespace adamix
