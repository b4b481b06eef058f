// Whether a backward in one pass goes as held_pass.h says, and how its tiles are shared out.
#pragma once

#include "common/held_pass.h"
#include "common/one_pass_plan.h"

#if defined(ADAMIX_LAUNCHERS)
namespace adamix {

// Whether a device takes held_pass.h's kernel, for what it serves, in the place of one_pass.h's.
template <typename T>
bool holds_pass(const Device& device) {
  return kIsHalf<T> && device.capability >= 70 && device.capability < kFragmentsFrom<T>;
}

// pass_plan for both kernels.
template <typename T>
PassPlan held_pass_plan(int64_t batch, int64_t tokens, int64_t hidden, int64_t rank, const Routing& down,
                        const Routing& up, bool biases, const Device& device) {
  if (!holds_pass<T>(device)) return pass_plan<T>(batch, tokens, hidden, rank, down, up, biases, device);
  if (rank % 8 != 0) return {};
  // That of a GPU with the other kernel, which has another memory.
  Device other = device;
  other.capability = 80, other.shared_bytes = 1 << 30;
  PassPlan plan = pass_plan<T>(batch, tokens, hidden, rank, down, up, biases, other);
  size_t bytes = shared_bytes<HeldPassMemory<T>>(static_cast<int>(hidden / kPassCols), plan.slots);
  bool fits = bytes <= static_cast<size_t>(device.shared_bytes) &&
              pass_sum_bytes(plan.blocks, plan.slots) <= static_cast<size_t>(device.shared_bytes);
  return fits ? plan : PassPlan{};
}

}  // namespace adamix
#endif
