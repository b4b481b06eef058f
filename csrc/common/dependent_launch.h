// A launch that is made ready while the one before it ends (programmatic dependent launch): on sm_90 and newer, where
// the driver lets graphs hold such launches too. Elsewhere it begins when the other has ended.
#pragma once

#include "common/launch.h"

namespace adamix {

// The next launch, if it is one of launch_after, may be made ready once all blocks have come here or ended.
ADAMIX_DEVICE void allow_next_launch() {
#if !defined(ADAMIX_HOST) && ADAMIX_ARCH >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the launch before has ended and what it wrote is there. What launch_after launches begins with it.
ADAMIX_DEVICE void await_launch() {
#if !defined(ADAMIX_HOST) && ADAMIX_ARCH >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if defined(ADAMIX_LAUNCHERS)
constexpr int kGraphsHoldDependentLaunches = 12030;  // a driver's version

// As launch() does, for a kernel whose threads all call await_launch() first.
template <typename Params>
void launch_after(const char* name, void (*kernel)(Params), const Shape& shape, const Device& device,
                  const Params& params) {
#if !defined(ADAMIX_HOST)
  static const bool possible = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= kGraphsHoldDependentLaunches;
  }();
  bool empty = shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0;
  if (possible && !empty && device.capability >= 90 && shape.shared_bytes <= kAskedShared) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{
        shape.grid, dim3(shape.threads), shape.shared_bytes, static_cast<cudaStream_t>(device.stream), &attribute, 1};
    if (cudaLaunchKernelEx(&config, kernel, params) == cudaSuccess) return;
    cudaGetLastError();
  }
#endif
  launch(name, kernel, shape, device, params);
}
#endif

}  // namespace adamix
