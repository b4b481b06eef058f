// Sums and maxima over a warp and over a block, in a fixed order.
#pragma once

#include "common/platform.h"

namespace adamix {

struct Add {
  template <typename Value>
  ADAMIX_DEVICE Value operator()(Value a, Value b) const {
    return a + b;
  }
};

// NaN wins, as in torch.
struct Max {
  template <typename Value>
  ADAMIX_DEVICE Value operator()(Value a, Value b) const {
    return a > b || a != a ? a : b;
  }
};

struct Or {
  ADAMIX_DEVICE uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};

struct Min {
  ADAMIX_DEVICE int operator()(int a, int b) const { return a < b ? a : b; }
};

// The value of the lane whose number differs by the bits of `distance`. All lanes call.
template <typename Value>
ADAMIX_DEVICE Value shuffle_xor(Value value, int distance) {
  static_assert(sizeof(Value) % 4 == 0, "whole words");
  union {
    Value value;
    uint32_t words[sizeof(Value) / 4];
  } bits{value};
#pragma unroll
  for (uint32_t& word : bits.words) word = __shfl_xor_sync(0xffffffffu, word, distance);
  return bits.value;
}

// The value of `lane`. All lanes call.
template <typename Value>
ADAMIX_DEVICE Value shuffle_from(Value value, int lane) {
  static_assert(sizeof(Value) % 4 == 0, "whole words");
  union Words {
    Value value;
    uint32_t words[sizeof(Value) / 4];
  } from{value}, to{value};
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Value) / 4); ++i) {
    to.words[i] = __shfl_sync(0xffffffffu, from.words[i], lane);
  }
  return to.value;
}

// combine over the values of each `Lanes` neighbouring lanes; every one of them gets the result. All lanes call.
template <int Lanes = 32, typename Value, typename Combine>
ADAMIX_DEVICE Value warp_reduce(Value value, Combine combine) {
#pragma unroll
  for (int distance = Lanes / 2; distance > 0; distance /= 2) value = combine(value, shuffle_xor(value, distance));
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
