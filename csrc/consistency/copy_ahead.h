// The next row's pieces, copied into the places of those in use.
#pragma once

#include "common/copy.h"

namespace adamix {

// bfloat16 is converted by integers on old GPUs, which leaves no registers.
template <typename T>
constexpr bool kLoadsAhead = ADAMIX_ARCH > 0 && ADAMIX_ARCH < 800;
template <>
constexpr bool kLoadsAhead<bfloat16> = false;

// A copy of 16 bytes into the place of what its thread uses between both calls. Without asynchronous copies the load is
// under way meanwhile; with them the copy starts when the place is free, and several may be between their calls.
template <typename T>
class CopyAhead {
 public:
  ADAMIX_DEVICE void start(const void* global) {
    if constexpr (kLoadsAhead<T>) value_ = *static_cast<const uint4*>(global);
  }
  ADAMIX_DEVICE void finish(void* shared, const void* global) const {
    if constexpr (kLoadsAhead<T>) {
      *static_cast<uint4*>(shared) = value_;
    } else {
      copy_async(shared, global);
    }
  }

 private:
  uint4 value_{};
};

}  // namespace adamix
