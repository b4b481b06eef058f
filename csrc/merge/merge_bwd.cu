// Gradients of the weighted mean: each block sums its elements' part of bank[m] * grad, one more block adds the parts.
#include "common/piece.h"
#include "merge/merge.h"
#include "merge/shares.h"

namespace adamix {

constexpr int kMergeWarps = kMergeThreads / 32;

template <typename Wide>
struct MergeSums {
  MergeShares<Wide> shares;
  Wide* parts;  // [warps, M]

  template <typename Memory>
  ADAMIX_BOTH MergeSums(Memory& memory, int experts) : shares(memory, experts) {
    parts = memory.template take<Wide>(kMergeWarps * experts);
  }
};

// bank_grad[m] = share[m] * grad; plane[m][block] = sum(bank[m] * grad) over the block's chunks.
template <typename T, typename Wide>
__global__ void __launch_bounds__(kMergeThreads, 16 / sizeof(Wide)) merge_grad_kernel(MergeGrad<T> p) {
  constexpr int kSize = Piece<T>::kSize;
  SharedMemory memory;
  MergeSums<Wide> sums(memory, p.experts);
  sums.shares.fill_normal(p.scores, p.scored, p.experts);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Wide* part = sums.parts + warp * p.experts;
  for (int m = lane; m < p.experts; m += 32) part[m] = Wide(0);
  __syncwarp();

  for (int64_t chunk = static_cast<int64_t>(blockIdx.x) * kMergeThreads * kSize; chunk < p.size;
       chunk += static_cast<int64_t>(gridDim.x) * kMergeThreads * kSize) {
    int64_t start = chunk + threadIdx.x * kSize;
    int valid = start < p.size ? static_cast<int>(p.size - start) : 0;
    Piece<T> grad{};
    if (valid > 0) grad = load_piece(p.grad + start, valid, p.aligned);
    for (int m = 0; m < p.experts; ++m) {
      int64_t at = static_cast<int64_t>(m) * p.size + start;
      if (p.plane != nullptr) {
        Wide dot = 0;
        if (valid > 0) {
          Piece<T> own = load_piece(p.bank + at, valid, p.aligned);
#pragma unroll
          for (int e = 0; e < kSize; ++e) {
            dot = multiply_add(Wide(to_float(own.values[e])), Wide(to_float(grad.values[e])), dot);
          }
        }
        dot = warp_reduce(dot, Add{});
        if (lane == 0) part[m] += dot;
      }
      if (p.bank_grad == nullptr || valid <= 0) continue;
      Piece<T> value;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        Wide g = to_float(grad.values[e]);
        g = p.scored == Kind::kNone ? g / Wide(p.experts) : g * sums.shares.values[m];
        value.values[e] = from_float<T>(static_cast<float>(g));
      }
      store_piece(p.bank_grad + at, value, valid, p.aligned);
    }
  }
  if (p.plane == nullptr) return;
  __syncthreads();
  for (int m = threadIdx.x; m < p.experts; m += kMergeThreads) {
    Wide sum = sums.parts[m];
    for (int other = 1; other < kMergeWarps; ++other) sum += sums.parts[other * p.experts + m];
    static_cast<Wide*>(p.plane)[static_cast<int64_t>(m) * gridDim.x + blockIdx.x] = sum;
  }
}

template <typename Wide>
struct MergeDots {
  MergeShares<Wide> shares;
  Wide* dots;  // [M]

  template <typename Memory>
  ADAMIX_BOTH MergeDots(Memory& memory, int experts) : shares(memory, experts) {
    dots = memory.template take<Wide>(experts);
  }
};

// scores_grad = share * (dots - sum(share * dots)), where dots are the sums of plane's rows.
template <typename Wide>
__global__ void __launch_bounds__(kMergeThreads, 16 / sizeof(Wide)) merge_scores_grad_kernel(MergeScoresGrad p) {
  SharedMemory memory;
  MergeDots<Wide> sums(memory, p.experts);
  sums.shares.fill_normal(p.scores, p.scored, p.experts);
  for (int m = threadIdx.x / 32; m < p.experts; m += kMergeWarps) {
    const Wide* row = static_cast<const Wide*>(p.plane) + static_cast<int64_t>(m) * p.blocks;
    Wide dot = 0;
    for (int block = threadIdx.x % 32; block < p.blocks; block += 32) dot += row[block];
    dot = warp_reduce(dot, Add{});
    if (threadIdx.x % 32 == 0) sums.dots[m] = dot;
  }
  __syncthreads();
  Wide mean = 0;
  for (int m = 0; m < p.experts; ++m) mean = multiply_add(sums.shares.values[m], sums.dots[m], mean);
  for (int m = threadIdx.x; m < p.experts; m += kMergeThreads) {
    store_scalar(p.scores_grad, p.scored, m, sums.shares.values[m] * (sums.dots[m] - mean));
  }
}

#define ADAMIX_INSTANTIATE(T)                                         \
  template __global__ void merge_grad_kernel<T, float>(MergeGrad<T>); \
  template __global__ void merge_grad_kernel<T, double>(MergeGrad<T>);
ADAMIX_INSTANTIATE(float)
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE
template __global__ void merge_scores_grad_kernel<float>(MergeScoresGrad);
template __global__ void merge_scores_grad_kernel<double>(MergeScoresGrad);

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_merge_grad(const MergeGrad<T>& params, int blocks, bool wide, const Device& device) {
  size_t bytes =
      wide ? shared_bytes<MergeSums<double>>(params.experts) : shared_bytes<MergeSums<float>>(params.experts);
  Shape shape{dim3(static_cast<unsigned>(blocks)), kMergeThreads, bytes};
  launch("merge_grad", wide ? merge_grad_kernel<T, double> : merge_grad_kernel<T, float>, shape, device, params);
}

template void launch_merge_grad(const MergeGrad<float>&, int, bool, const Device&);
template void launch_merge_grad(const MergeGrad<half>&, int, bool, const Device&);
template void launch_merge_grad(const MergeGrad<bfloat16>&, int, bool, const Device&);

void launch_merge_scores_grad(const MergeScoresGrad& params, bool wide, const Device& device) {
  size_t bytes =
      wide ? shared_bytes<MergeDots<double>>(params.experts) : shared_bytes<MergeDots<float>>(params.experts);
  launch("merge_scores_grad", wide ? merge_scores_grad_kernel<double> : merge_scores_grad_kernel<float>,
         {dim3(1), kMergeThreads, bytes}, device, params);
}
#endif

}  // namespace adamix
