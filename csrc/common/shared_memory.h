// A block's dynamic shared memory, handed out array by array.
//
// A kernel describes its arrays once, as a struct built from a `Memory&`: on the device from SharedMemory,
// in the launcher from SharedBytes, which only counts. On the CPU each array is an allocation of its own,
// so that a sanitiser sees an index that leaves its array.
#pragma once

#include "common/platform.h"

namespace adamix {

constexpr int kSharedAlignment = 128;

#if !defined(ADAMIX_HOST)
extern __shared__ __align__(kSharedAlignment) unsigned char adamix_shared_memory[];
#endif

class SharedMemory {
 public:
  template <typename T>
  ADAMIX_BOTH T* take(int count) {
    size_t bytes = sizeof(T) * count;
#if defined(ADAMIX_HOST)
    return static_cast<T*>(host::shared_array(taken_++, bytes, kSharedAlignment));
#elif ADAMIX_ARCH > 0
    T* array = reinterpret_cast<T*>(adamix_shared_memory + used_);
    used_ += (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    return array;
#else
    used_ += bytes;
    return nullptr;
#endif
  }

 private:
#if defined(ADAMIX_HOST)
  int taken_ = 0;
#else
  size_t used_ = 0;
#endif
};

#if defined(ADAMIX_LAUNCHERS)
class SharedBytes {
 public:
  template <typename T>
  ADAMIX_BOTH T* take(int count) {
    bytes_ += (sizeof(T) * count + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    return nullptr;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

// Bytes of shared memory that a kernel with these arrays needs.
template <typename Arrays, typename... Sizes>
size_t shared_bytes(Sizes... sizes) {
  SharedBytes memory;
  Arrays arrays(memory, sizes...);
  (void)arrays;
  return memory.bytes();
}
#endif

}  // namespace adamix
