// Launches: one parameter struct by value, the current stream, every error raised with the kernel's name.
#pragma once

#include "common/platform.h"

#if defined(ADAMIX_LAUNCHERS)
#include <stdexcept>
#include <string>

namespace adamix {

struct Shape {
  dim3 grid;
  int threads;
  size_t shared_bytes;
  int cluster = 1;  // blocks of a cluster along x; above 1 on sm_90 and newer only
};

// What the launchers need to know of the device they launch on.
struct Device {
  int index;
  int multiprocessors;
  int shared_bytes;  // a block's opt-in limit
  int capability;    // 70, 75, 80, ...: of the code that runs there
  void* stream;
};

// Launches kernel(params); throws std::runtime_error that names the kernel when it cannot be launched.
template <typename Params>
void launch(const char* name, void (*kernel)(Params), const Shape& shape, const Device& device, const Params& params) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  if (shape.shared_bytes > static_cast<size_t>(device.shared_bytes)) {
    throw std::runtime_error(std::string(name) + ": needs " + std::to_string(shape.shared_bytes) +
                             " bytes of shared memory, the device has " + std::to_string(device.shared_bytes) +
                             "; a smaller rank needs less, and so does a 16-bit dtype");
  }
#if defined(ADAMIX_HOST)
  host::run(name, shape.grid, shape.threads, shape.shared_bytes, shape.cluster, [&] { kernel(params); });
#else
  auto check = [&](cudaError_t error) {
    if (error != cudaSuccess) {
      cudaGetLastError();
      throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
    }
  };
  if (shape.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)));
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = shape.cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(device.stream);
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments));
  check(cudaPeekAtLastError());
#endif
}

}  // namespace adamix
#endif
