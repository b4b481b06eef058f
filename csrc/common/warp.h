// Sums and maxima over a warp and over a block, in a fixed order.
#pragma once

#include "common/platform.h"

namespace adamix {

struct Add {
  ADAMIX_DEVICE float operator()(float a, float b) const { return a + b; }
};

// NaN wins, as in torch.
struct Max {
  ADAMIX_DEVICE float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// combine over the warp's 32 values; every lane gets the result. All lanes call.
template <typename Combine>
ADAMIX_DEVICE float warp_reduce(float value, Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// combine over the block's Threads values; every thread gets the result. All threads call.
// scratch: Threads / 32 floats of shared memory, free to be written; it may be reused after the next barrier.
template <int Threads, typename Combine>
ADAMIX_DEVICE float block_reduce(float value, Combine combine, float* scratch) {
  value = warp_reduce(value, combine);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < Threads / 32; ++warp) value = combine(value, scratch[warp]);
  __syncthreads();
  return value;
}

}  // namespace adamix
