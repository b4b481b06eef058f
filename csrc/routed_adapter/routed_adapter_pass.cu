// The routed adapter's backward in one pass: what one_pass.h describes, then the sum of its planes.
#include "common/launch.h"
#include "routed_adapter/one_pass_kernel.h"
#include "routed_adapter/routed_adapter.h"

namespace adamix {

// Every gradient = the sum of its planes, in the order of the blocks that left them; zero where none did.
template <typename T>
__global__ void __launch_bounds__(kPassSumThreads) routed_adapter_pass_sum_kernel(RoutedAdapterPassSum<T> p) {
  SharedMemory memory;
  int planes = p.blocks * p.slots;
  int* found = memory.take<int>(planes + 1);
  bool up = static_cast<int>(blockIdx.x) >= p.down_jobs;
  int job = static_cast<int>(blockIdx.x) - (up ? p.down_jobs : 0);
  int expert = job / p.chunks, side = up ? p.slots : 0;
  if (threadIdx.x < 32) {
    int count = 0;
    for (int from = 0; from < planes; from += 32) {
      int at = from + static_cast<int>(threadIdx.x), plane = at / p.slots * 2 * p.slots + side + at % p.slots;
      bool mine = at < planes && p.experts[plane] == expert;
      uint32_t all = __ballot_sync(0xffffffffu, mine);
      if (mine) found[1 + count + __popc(all & ((1u << threadIdx.x) - 1))] = plane;
      count += __popc(all);
    }
    if (threadIdx.x == 0) found[0] = count;
  }
  __syncthreads();
  // Each quarter of the threads adds up a quarter of the planes.
  constexpr int kSize = Piece<float>::kSize, kPieces = kPassSumThreads / kPassSumParts;
  int piece = threadIdx.x % kPieces, part = threadIdx.x / kPieces;
  int at = (job % p.chunks * kPieces + piece) * kSize;
  int weights = p.rank * p.hidden, biases = up ? p.hidden : p.rank, count = found[0];
  int a_part = ceil_div(count, kPassSumParts), last = count < (part + 1) * a_part ? count : (part + 1) * a_part;
  float sums[kSize] = {};
  if (at < weights + biases) {
#pragma unroll 8
    for (int i = part * a_part; i < last; ++i) {
      Piece<float> one = *reinterpret_cast<const Piece<float>*>(p.planes + found[1 + i] * p.planes_size + at);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sums[e] += one.values[e];
    }
  }
  float* all = memory.take<float>(kPassSumThreads * kSize);
#pragma unroll
  for (int e = 0; e < kSize; ++e) all[threadIdx.x * kSize + e] = sums[e];
  __syncthreads();
  if (part > 0 || at >= weights + biases) return;
#pragma unroll
  for (int other = 1; other < kPassSumParts; ++other) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) sums[e] += all[(other * kPieces + piece) * kSize + e];
  }
  T* weight = up ? p.up_weight : p.down_weight;
  T* bias = up ? p.up_bias : p.down_bias;
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    int element = at + e;
    if (element >= weights + biases) return;
    T value = from_float<T>(sums[e]);
    if (element >= weights) {
      bias[static_cast<int64_t>(expert) * biases + element - weights] = value;
    } else if (up) {
      weight[static_cast<int64_t>(expert) * weights + element % p.hidden * p.rank + element / p.hidden] = value;
    } else {
      weight[static_cast<int64_t>(expert) * weights + element] = value;
    }
  }
}

#define ADAMIX_INSTANTIATE(T)                                                                 \
  template __global__ void routed_adapter_one_pass_kernel<T, true>(RoutedAdapterOnePass<T>);  \
  template __global__ void routed_adapter_one_pass_kernel<T, false>(RoutedAdapterOnePass<T>); \
  template __global__ void routed_adapter_pass_sum_kernel<T>(RoutedAdapterPassSum<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_routed_adapter_one_pass(const RoutedAdapterOnePass<T>& params, int blocks, int cluster, bool keeps,
                                    const Device& device) {
  int warps = params.hidden / kPassCols;
  auto kernel = keeps ? routed_adapter_one_pass_kernel<T, true> : routed_adapter_one_pass_kernel<T, false>;
  Shape shape{dim3(blocks), warps * 32, shared_bytes<PassMemory<T>>(warps, params.slots, params.tiles_a_block, keeps)};
  const void* any = reinterpret_cast<const void*>(kernel);
  shape.cluster = cluster;
  if (cluster > 1) {
    int largest = largest_cluster("routed_adapter_one_pass", any, shape.threads, device);
    while (shape.cluster > largest) shape.cluster /= 2;
  }
  try {
    launch("routed_adapter_one_pass", kernel, shape, device, params);
  } catch (const ClusterError&) {
    rule_out_cluster(any, device, shape.cluster);
    shape.cluster = 1;
    launch("routed_adapter_one_pass", kernel, shape, device, params);
  }
}

template <typename T>
void launch_routed_adapter_pass_sum(RoutedAdapterPassSum<T> params, int down_experts, int up_experts,
                                    const Device& device) {
  constexpr int kBlock = kPassSumThreads / kPassSumParts * Piece<float>::kSize;
  params.chunks = ceil_div(static_cast<int>(params.planes_size), kBlock);
  params.down_jobs = down_experts * params.chunks;
  size_t planes = static_cast<size_t>(params.blocks) * params.slots + 1;
  size_t bytes = (planes * sizeof(int) + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment +
                 kPassSumThreads * sizeof(Piece<float>);
  launch("routed_adapter_pass_sum", routed_adapter_pass_sum_kernel<T>,
         {dim3(params.down_jobs + up_experts * params.chunks), kPassSumThreads, bytes}, device, params);
}

#define ADAMIX_INSTANTIATE(T)                                                                                  \
  template void launch_routed_adapter_one_pass(const RoutedAdapterOnePass<T>&, int, int, bool, const Device&); \
  template void launch_routed_adapter_pass_sum(RoutedAdapterPassSum<T>, int, int, const Device&);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE
#endif

}  // namespace adamix
