#include "common/kernel_limits.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "common/checks.h"
#include "common/fitting_cluster.h"

namespace adamix {
namespace {

struct Limits {
  bool allowed = false;
  size_t shared_bytes = 0;  // of a block, beside what the kernel takes by itself
  int largest_cluster = 0;  // 0: not asked yet
  int clusters[9] = {};     // by their blocks: 1 + how many run at once; 0: not asked yet
};

std::mutex mutex;

// The caller holds `mutex`.
Limits& limits_of(const void* kernel, const Device& device) {
  static std::map<std::pair<const void*, int>, Limits> known;
  return known[{kernel, device.index}];
}

void allow(const char* name, const void* kernel, const Device& device, Limits& limits) {
  if (limits.allowed) return;
  cudaFuncAttributes attributes{};
  check_cuda(name, cudaFuncGetAttributes(&attributes, kernel));
  limits.shared_bytes = device.shared_bytes - attributes.sharedSizeBytes;
  check_cuda(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(limits.shared_bytes)));
  check_cuda(name, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
  limits.allowed = true;
}

// Clusters of `size` blocks that run at once; 0 where there are none. The caller has called allow().
int count_clusters(const void* kernel, int size, int threads, const Limits& limits) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{dim3(size), dim3(threads), limits.shared_bytes, nullptr, &attribute, 1};
  int clusters = 0;
  cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error == cudaSuccess) return clusters;
  cudaGetLastError();
  return 0;
}

}  // namespace

void allow_shared_memory(const char* name, const void* kernel, const Device& device) {
  std::lock_guard<std::mutex> lock(mutex);
  allow(name, kernel, device, limits_of(kernel, device));
}

int largest_cluster(const char* name, const void* kernel, int threads, const Device& device) {
  if (device.capability < 90) return 1;
  std::lock_guard<std::mutex> lock(mutex);
  Limits& limits = limits_of(kernel, device);
  if (limits.largest_cluster > 0) return limits.largest_cluster;
  allow(name, kernel, device, limits);
  int size = 8;
  while (size > 1 && count_clusters(kernel, size, threads, limits) == 0) size /= 2;
  return limits.largest_cluster = size;
}

int fitting_cluster(const char* name, const void* kernel, int threads, int most, int blocks, const Device& device) {
  if (most == 1) return 1;
  int size = std::min(most, largest_cluster(name, kernel, threads, device));
  std::lock_guard<std::mutex> lock(mutex);
  Limits& limits = limits_of(kernel, device);
  for (; size > 1; size /= 2) {
    int& clusters = limits.clusters[size];
    if (clusters == 0) clusters = 1 + count_clusters(kernel, size, threads, limits);
    if ((clusters - 1) * size >= blocks) break;
  }
  return size;
}

void rule_out_cluster(const void* kernel, const Device& device, int size) {
  std::lock_guard<std::mutex> lock(mutex);
  Limits& limits = limits_of(kernel, device);
  limits.largest_cluster = std::max(1, std::min(limits.largest_cluster, size / 2));
}

}  // namespace adamix
