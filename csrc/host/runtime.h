// The part of the CUDA runtime that csrc/ calls, on the CPU. It keeps the driver's rules, so that code which breaks
// them fails here as it would there, and notes every call for `adamix_host_calls`.
//
// The emulated device is what the environment says when a tensor is looked at; each set of values is a device with a
// number of its own, as the launchers remember what they have found out about a device:
//   ADAMIX_HOST_CAPABILITY   90       10 * compute capability
//   ADAMIX_HOST_SHARED       232448   bytes of shared memory, a block's opt-in limit
//   ADAMIX_HOST_CLUSTER      8        blocks of the largest cluster that the driver calls possible
//   ADAMIX_HOST_CLUSTER_RUN  8        and of the largest that it launches
//   ADAMIX_HOST_LOADS        1        0: the machine code does not load on this device
//   ADAMIX_HOST_MULTIPROCESSORS  4    its multiprocessors
// ADAMIX_HOST_DRIVER is the driver's version (13000); the runtime's is 13000.
// ADAMIX_HOST_IDLE=1, once in a process: nothing runs, and a call of the runtime costs next to nothing. What remains is
// the host's work for a launch, for `python -m benchmarks.run host`; launches are noted, calls are not.
#pragma once

#include "host/cuda.h"

using cudaStream_t = void*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
// gridDim and blockDim are macros here.
struct cudaLaunchConfig_t {
  dim3 grid, block;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace adamix::host {

// Whether ADAMIX_HOST_IDLE=1.
bool idle();

// The number of the device that the environment describes now.
int device_of_environment();

// The one argument of a kernel.
struct Argument {
  const void* data;
  size_t bytes;
};

template <typename T>
Argument argument(const T& value) {
  return {&value, sizeof value};
}

// The rules of a launch; body is what each thread runs, unless somebody takes launches (adamix_host_take_launches).
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, Argument argument,
                   const std::function<void()>& body);

// For `adamix_host_launches`: the name of a kernel about to be launched.
void note_launch(const char* name);

}  // namespace adamix::host

template <typename Expected, typename Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected), const Given& argument) {
  return adamix::host::launch(*config, reinterpret_cast<const void*>(kernel), adamix::host::argument(argument),
                              [&] { kernel(argument); });
}
