// Blocks of a cluster, which read each other's shared memory: sm_90 and newer. Elsewhere a block is its own cluster.
#pragma once

#include "common/platform.h"

namespace adamix {

ADAMIX_DEVICE int cluster_rank() {
#if defined(ADAMIX_HOST)
  return host::cluster_rank();
#elif ADAMIX_ARCH >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

ADAMIX_DEVICE int cluster_size() {
#if defined(ADAMIX_HOST)
  return host::cluster_size();
#elif ADAMIX_ARCH >= 900
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

// A barrier of all threads of the cluster's blocks; what they wrote to shared memory is visible to all after it.
ADAMIX_DEVICE void cluster_barrier() {
#if defined(ADAMIX_HOST)
  host::cluster_barrier();
#elif ADAMIX_ARCH >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The same array of shared memory in the cluster's block `rank`, which must have taken it and not be through yet.
template <typename T>
ADAMIX_DEVICE const T* cluster_peer(T* shared, int rank) {
#if defined(ADAMIX_HOST)
  return static_cast<const T*>(host::cluster_peer(shared, rank));
#elif ADAMIX_ARCH >= 900
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<const T*>(address);
#else
  (void)rank;
  return shared;
#endif
}

}  // namespace adamix
