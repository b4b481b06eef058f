// Four neighbouring elements of a LoRA factor of any dtype: their means over its experts.
#pragma once

#include "merge/merge.h"

namespace adamix {

template <typename Wide>
struct alignas(16) Four {
  Wide values[4];
};

// Elements at .. at + 3 of every expert of the factor at `data`, summed; the first `valid`, then zeros.
template <typename Wide, typename T>
ADAMIX_DEVICE Four<Wide> sum_of_four(const LoraFactor& factor, const void* data, int64_t at, int valid) {
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Together {
    T values[4];
  };
  Four<Wide> sum{};
  const T* from = static_cast<const T*>(data) + at;
  for (int m = 0; m < factor.experts; ++m, from += factor.stride) {
    Together four;
    if (factor.by_four && valid > 0) {
      four = *reinterpret_cast<const Together*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) four.values[e] = e < valid ? from[e] : T{};
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      Wide value;
      if constexpr (sizeof(T) == 8) {
        value = four.values[e];
      } else {
        value = to_float(four.values[e]);
      }
      sum.values[e] = m == 0 ? value : sum.values[e] + value;
    }
  }
  return sum;
}

template <typename Wide>
ADAMIX_DEVICE Four<Wide> mean_of_four(const LoraFactor& factor, const void* data, Kind kind, int64_t at, int valid) {
  Four<Wide> mean;
  if constexpr (sizeof(Wide) == 8) {
    mean = sum_of_four<Wide, double>(factor, data, at, valid);
  } else if (kind == Kind::kFloat) {
    mean = sum_of_four<Wide, float>(factor, data, at, valid);
  } else if (kind == Kind::kHalf) {
    mean = sum_of_four<Wide, half>(factor, data, at, valid);
  } else {
    mean = sum_of_four<Wide, bfloat16>(factor, data, at, valid);
  }
  if (factor.experts > 1) {
#pragma unroll
    for (int e = 0; e < 4; ++e) mean.values[e] /= Wide(factor.experts);
  }
  return mean;
}

}  // namespace adamix
