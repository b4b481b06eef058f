// The routed adapter's backward in one pass: what one_pass.h describes, then the sum of its planes.
#include "common/launch.h"
#include "routed_adapter/one_pass.h"
#include "routed_adapter/routed_adapter.h"

namespace adamix {

#define ADAMIX_INSTANTIATE(T)                                                         \
  template __global__ void routed_adapter_one_pass_kernel<T, true>(RoutedAdapterOnePass<T>); \
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
  Shape shape{dim3(blocks), warps * 32,
              shared_bytes<PassMemory<T>>(warps, params.slots, params.tiles_a_block, keeps)};
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

#define ADAMIX_INSTANTIATE(T)                                                                          \
  template void launch_routed_adapter_one_pass(const RoutedAdapterOnePass<T>&, int, int, bool, const Device&);   \
  template void launch_routed_adapter_pass_sum(RoutedAdapterPassSum<T>, int, int, const Device&);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE
#endif

}  // namespace adamix
