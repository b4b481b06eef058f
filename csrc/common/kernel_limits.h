// What a kernel may ask of a device, settled once for both of them, before the kernel's first launch there.
//
// A kernel's attributes belong to the process: were they set for every launch, two threads that launch it with two
// sizes would undo each other's.
#pragma once

#include "common/platform.h"

#if defined(ADAMIX_LAUNCHERS)
#include <stdexcept>

namespace adamix {

// What the launchers need to know of the device they launch on.
struct Device {
  int index;
  int multiprocessors;
  int shared_bytes;  // a block's opt-in limit
  int capability;    // 70, 75, 80, ...: of the code that runs there
  void* stream;
};

// Blocks that take more shared memory than this are launched after `allow_shared_memory` alone. Every kernel may take
// 48 KiB; from 16 KiB on, how many blocks a multiprocessor holds hangs on how it shares out its memory.
constexpr size_t kAskedShared = 16 * 1024;

// A cluster that the device cannot hold, though `largest_cluster` said it could; nothing was launched.
class ClusterError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Lets the kernel's blocks take all the shared memory that the current device gives one, and asks for as much of it a
// multiprocessor as there is. The first call for a kernel and device does it, others return. Throws
// std::runtime_error that names the kernel.
void allow_shared_memory(const char* name, const void* kernel, const Device& device);

// Blocks of the largest cluster, at most 8, that the current device can hold where each block takes `threads` threads
// and all the shared memory it may: 1 where there are no clusters. A slice of a GPU (MIG, MPS) may not have the
// multiprocessors side by side. Asked once for a kernel and device.
int largest_cluster(const char* name, const void* kernel, int threads, const Device& device);

// From now on largest_cluster is below `size` for this kernel and device.
void rule_out_cluster(const void* kernel, const Device& device, int size);

}  // namespace adamix
#endif
