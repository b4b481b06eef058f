// The routed adapter's backward in one pass: what common/one_pass.h describes, then the sum of its planes.
#include "common/one_pass_launch.h"
#include "routed_adapter/routed_adapter.h"

namespace adamix {

template <typename T, bool Keeps>
__global__ void __launch_bounds__(kPassThreads) routed_adapter_one_pass_kernel(OnePass<T> p) {
  one_pass<T, false, Keeps>(p);
}

template <typename T>
__global__ void __launch_bounds__(kPassSumThreads) routed_adapter_pass_sum_kernel(PassSum<T> p) {
  pass_sum<kPassSumParts>(p);
}

#define ADAMIX_INSTANTIATE(T)                                                    \
  template __global__ void routed_adapter_one_pass_kernel<T, true>(OnePass<T>);  \
  template __global__ void routed_adapter_one_pass_kernel<T, false>(OnePass<T>); \
  template __global__ void routed_adapter_pass_sum_kernel<T>(PassSum<T>);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_routed_adapter_one_pass(const OnePass<T>& params, const PassPlan& plan, const Device& device) {
  auto kernel = plan.keeps ? routed_adapter_one_pass_kernel<T, true> : routed_adapter_one_pass_kernel<T, false>;
  launch_one_pass("routed_adapter_one_pass", kernel, params, plan, device);
}

template <typename T>
void launch_routed_adapter_pass_sum(const PassSum<T>& params, int down_experts, int up_experts, const Device& device) {
  launch_pass_sum<kPassSumParts>("routed_adapter_pass_sum", routed_adapter_pass_sum_kernel<T>, params, down_experts,
                                 up_experts, device);
}

#define ADAMIX_INSTANTIATE(T)                                                                      \
  template void launch_routed_adapter_one_pass(const OnePass<T>&, const PassPlan&, const Device&); \
  template void launch_routed_adapter_pass_sum(const PassSum<T>&, int, int, const Device&);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE
#endif

}  // namespace adamix
