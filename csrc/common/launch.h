// Launches: one parameter struct by value, the current stream, every error raised with the kernel's name.
#pragma once

#include "common/kernel_limits.h"

#if defined(ADAMIX_LAUNCHERS)
#include <stdexcept>
#include <string>

namespace adamix {

struct Shape {
  dim3 grid;
  int threads;
  size_t shared_bytes;
  int cluster = 1;  // blocks of a cluster along x; above 1 up to `largest_cluster`
};

// Launches kernel(params); throws std::runtime_error that names the kernel when it cannot be launched, ClusterError
// when that is for its cluster's size.
template <typename Params>
void launch(const char* name, void (*kernel)(Params), const Shape& shape, const Device& device, const Params& params) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  if (shape.shared_bytes > static_cast<size_t>(device.shared_bytes)) {
    throw std::runtime_error(std::string(name) + ": needs " + std::to_string(shape.shared_bytes) +
                             " bytes of shared memory, the device has " + std::to_string(device.shared_bytes) +
                             "; a smaller rank needs less, and so does a 16-bit dtype");
  }
  if (shape.shared_bytes > kAskedShared) allow_shared_memory(name, reinterpret_cast<const void*>(kernel), device);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = shape.cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{shape.grid,         dim3(shape.threads),
                            shape.shared_bytes, static_cast<cudaStream_t>(device.stream),
                            &attribute,         shape.cluster > 1 ? 1u : 0u};
#if defined(ADAMIX_HOST)
  host::note_launch(name);
#endif
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  if (error == cudaSuccess) error = cudaPeekAtLastError();
  if (error == cudaSuccess) return;
  cudaGetLastError();
  std::string message = std::string(name) + ": " + cudaGetErrorString(error);
  bool of_cluster = error == cudaErrorInvalidClusterSize || error == cudaErrorLaunchOutOfResources;
  if (shape.cluster > 1 && of_cluster) throw ClusterError(message);
  throw std::runtime_error(message);
}

}  // namespace adamix
#endif
