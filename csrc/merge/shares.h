// The experts' shares of a mean: softmax(scores).
#pragma once

#include "common/scalar.h"
#include "common/shared_memory.h"
#include "common/warp.h"

namespace adamix {

constexpr int kMergeThreads = 256;

ADAMIX_DEVICE float exponential(float x) { return expf(x); }
ADAMIX_DEVICE double exponential(double x) { return exp(x); }
ADAMIX_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
ADAMIX_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <typename Wide>
struct MergeShares {
  Wide* values;  // [M]

  template <typename Memory>
  ADAMIX_BOTH MergeShares(Memory& memory, int experts) {
    values = memory.template take<Wide>(experts);
  }

  // values = exp(scores - max); returns their sum. Every thread of the block calls.
  ADAMIX_DEVICE Wide fill(const void* scores, Kind scored, int experts) const {
    if (scored == Kind::kNone) return Wide(experts);
    for (int m = threadIdx.x; m < experts; m += kMergeThreads) values[m] = load_scalar<Wide>(scores, scored, m);
    __syncthreads();
    Wide top = values[0];
    for (int m = 1; m < experts; ++m) top = Max{}(top, values[m]);
    __syncthreads();
    for (int m = threadIdx.x; m < experts; m += kMergeThreads) values[m] = exponential(values[m] - top);
    __syncthreads();
    Wide total = values[0];
    for (int m = 1; m < experts; ++m) total += values[m];
    return total;
  }

  // values = softmax(scores); nothing without scores. Every thread of the block calls.
  ADAMIX_DEVICE void fill_normal(const void* scores, Kind scored, int experts) const {
    if (scored == Kind::kNone) return;
    Wide total = fill(scores, scored, experts);
    __syncthreads();
    for (int m = threadIdx.x; m < experts; m += kMergeThreads) values[m] /= total;
    __syncthreads();
  }
};

}  // namespace adamix
