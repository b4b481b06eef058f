// The CUDA runtime's rules, as host/runtime.h tells them.
#include "host/runtime.h"

#include <chrono>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "host/fibers.h"

namespace adamix::host {

using Taker = void (*)(const void* kernel, const int* sizes, const void* argument, int bytes);

namespace {

constexpr int kUsualShared = 48 * 1024;  // what a block may take of shared memory unless a kernel is allowed more
constexpr int kRuntimeVersion = 13000;
constexpr int kMultiprocessors = 4, kIdleMultiprocessors = 132;

struct DeviceFacts {
  int capability, shared, cluster, cluster_run, loads, multiprocessors;

  bool operator==(const DeviceFacts& other) const {
    return capability == other.capability && shared == other.shared && cluster == other.cluster &&
           cluster_run == other.cluster_run && loads == other.loads && multiprocessors == other.multiprocessors;
  }
};

// Of the process: every thread sees the same devices and the same settings of a kernel.
std::mutex mutex;
std::vector<DeviceFacts> devices;
std::map<std::pair<const void*, int>, int> shared_limits;

Taker taker = nullptr;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

int from_environment(const char* variable, int usual) {
  const char* value = std::getenv(variable);
  return value == nullptr ? usual : std::atoi(value);
}

bool is_device(int device) {
  std::lock_guard<std::mutex> lock(mutex);
  return device >= 0 && device < static_cast<int>(devices.size());
}

// Of one that `device_of_environment` named.
DeviceFacts facts_of(int device) {
  std::lock_guard<std::mutex> lock(mutex);
  return devices.at(device);
}

int shared_limit(const void* kernel) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = shared_limits.find({kernel, current_device});
  return found == shared_limits.end() ? kUsualShared : found->second;
}

cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int cluster_of(const cudaLaunchConfig_t& config) {
  int cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config.attrs[i].val.clusterDim.x;
  }
  return cluster;
}

}  // namespace

bool idle() {
  static const bool is = from_environment("ADAMIX_HOST_IDLE", 0) != 0;
  return is;
}

int device_of_environment() {
  if (idle() && !devices.empty()) return 0;
  DeviceFacts facts{from_environment("ADAMIX_HOST_CAPABILITY", 90),
                    from_environment("ADAMIX_HOST_SHARED", 232448),
                    from_environment("ADAMIX_HOST_CLUSTER", 8),
                    from_environment("ADAMIX_HOST_CLUSTER_RUN", 8),
                    from_environment("ADAMIX_HOST_LOADS", 1),
                    from_environment("ADAMIX_HOST_MULTIPROCESSORS", idle() ? kIdleMultiprocessors : kMultiprocessors)};
  std::lock_guard<std::mutex> lock(mutex);
  for (size_t i = 0; i < devices.size(); ++i) {
    if (devices[i] == facts) return static_cast<int>(i);
  }
  devices.push_back(facts);
  return static_cast<int>(devices.size()) - 1;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, Argument argument,
                   const std::function<void()>& body) {
  if (idle()) return cudaSuccess;
  note_call("cudaLaunchKernelEx");
  DeviceFacts facts = facts_of(current_device);
  int cluster = cluster_of(config);
  if (facts.loads == 0) return returned(cudaErrorNoKernelImageForDevice);
  if (config.dynamicSmemBytes > static_cast<size_t>(shared_limit(kernel))) return returned(cudaErrorInvalidValue);
  if (cluster > 1 && (facts.capability < 90 || cluster > facts.cluster_run)) {
    return returned(cudaErrorInvalidClusterSize);
  }
  if (taker != nullptr) {
    int sizes[] = {static_cast<int>(config.grid.x),           static_cast<int>(config.grid.y),
                   static_cast<int>(config.grid.z),           static_cast<int>(config.block.x),
                   static_cast<int>(config.dynamicSmemBytes), cluster};
    taker(kernel, sizes, argument.data, static_cast<int>(argument.bytes));
    return cudaSuccess;
  }
  run(config.grid, config.block.x, config.dynamicSmemBytes, cluster, body);
  return cudaSuccess;
}

}  // namespace adamix::host

// From now on launches are given to `taker` instead of being run: the kernel's address; grid x, y, z, threads of a
// block, bytes of dynamic shared memory, blocks of a cluster; its argument. Null: they are run again.
extern "C" __attribute__((visibility("default"))) void adamix_host_take_launches(adamix::host::Taker taker) {
  adamix::host::taker = taker;
}

using namespace adamix::host;

cudaError_t cudaDriverGetVersion(int* version) {
  note_call("cudaDriverGetVersion");
  *version = from_environment("ADAMIX_HOST_DRIVER", kRuntimeVersion);
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  note_call("cudaRuntimeGetVersion");
  *version = kRuntimeVersion;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  note_call("cudaGetDevice");
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  note_call("cudaSetDevice");
  if (!is_device(device)) return returned(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  note_call("cudaDeviceGetAttribute");
  if (!is_device(device)) return returned(cudaErrorInvalidDevice);
  DeviceFacts facts = facts_of(device);
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      *value = facts.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = facts.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = facts.capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = facts.shared;
      return cudaSuccess;
  }
  return returned(cudaErrorInvalidValue);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  note_call("cudaFuncGetAttributes");
  if (facts_of(current_device).loads == 0) return returned(cudaErrorNoKernelImageForDevice);
  *attributes = {0};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  note_call("cudaFuncSetAttribute", which, value);
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > facts_of(current_device).shared) return returned(cudaErrorInvalidValue);
    {
      std::lock_guard<std::mutex> lock(mutex);
      shared_limits[{kernel, current_device}] = value;
    }
    // Another thread has the time to set the same kernel otherwise before this one launches it.
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  note_call("cudaOccupancyMaxActiveClusters", cluster_of(*config), static_cast<int>(config->dynamicSmemBytes));
  DeviceFacts facts = facts_of(current_device);
  *clusters = 0;
  if (config->dynamicSmemBytes > static_cast<size_t>(shared_limit(kernel)) || facts.capability < 90) {
    return returned(cudaErrorInvalidValue);
  }
  int size = cluster_of(*config);
  if (size <= facts.cluster) *clusters = facts.multiprocessors < size ? 1 : facts.multiprocessors / size;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  note_call("cudaGetLastError");
  return std::exchange(last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  note_call("cudaPeekAtLastError");
  return last_error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
  }
  return "unknown error";
}
