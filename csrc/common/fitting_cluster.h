// Clusters of blocks that all run at once.
#pragma once

#include "common/kernel_limits.h"

#if defined(ADAMIX_LAUNCHERS)
namespace adamix {

// Blocks of the largest cluster, `most` at most (a power of two up to 8), of which the current device runs `blocks`
// blocks at once, each of `threads` threads and with all the shared memory it may take: not every multiprocessor has
// as many neighbours as a cluster needs. 1 where there is none, and where largest_cluster says so. Asked once for a
// kernel and device.
int fitting_cluster(const char* name, const void* kernel, int threads, int most, int blocks, const Device& device);

}  // namespace adamix
#endif
