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

// A barrier of all threads of the cluster's blocks, in two halves: what they wrote to shared memory before the first is
// visible to all after the second.
ADAMIX_DEVICE void cluster_arrive() {
#if !defined(ADAMIX_HOST) && ADAMIX_ARCH >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

ADAMIX_DEVICE void cluster_wait() {
#if defined(ADAMIX_HOST)
  host::cluster_barrier();
#elif ADAMIX_ARCH >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// *at = value in the shared memory of the cluster's block `rank`, which must run: a barrier after its start, and none
// of its own after its end.
ADAMIX_DEVICE void cluster_store(float* at, int rank, float value) {
#if defined(ADAMIX_HOST)
  *static_cast<float*>(host::cluster_peer(at, rank)) = value;
#elif ADAMIX_ARCH >= 900
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(at));
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#else
  (void)rank;
  *at = value;
#endif
}

// Where the cluster's block `rank` has what this block has at `at`, in shared memory. A barrier stands before it is
// read.
template <typename Value>
ADAMIX_DEVICE Value* cluster_at(Value* at, int rank) {
#if defined(ADAMIX_HOST)
  return static_cast<Value*>(host::cluster_peer(at, rank));
#elif ADAMIX_ARCH >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(at), "r"(rank));
  return reinterpret_cast<Value*>(address);
#else
  (void)rank;
  return at;
#endif
}

}  // namespace adamix
