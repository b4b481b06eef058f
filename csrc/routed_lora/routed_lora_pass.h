// Routed LoRA's backward in one pass (common/one_pass.h): half and bfloat16 alone.
#pragma once

#include "common/one_pass_plan.h"

#if defined(ADAMIX_LAUNCHERS)
namespace adamix {

template <typename T>
void launch_routed_lora_one_pass(const OnePass<T>& params, const PassPlan& plan, const Device& device);

// a_experts, b_experts: 0 where that side is not wanted.
template <typename T>
void launch_routed_lora_pass_sum(const PassSum<T>& params, int a_experts, int b_experts, const Device& device);

}  // namespace adamix
#endif
