// logits = x W^T + b; gates = softmax(logits), or that of the top_k largest, with their ids.
#pragma once

#include "common/dtype.h"
#include "common/launch.h"

namespace adamix {

constexpr int kRouterWarps = 8;
constexpr int kRouterRows = 16;  // of a block
constexpr int kRouterMostExperts = 256;

template <typename T>
struct Router {
  const T* x;          // [rows, features]
  const void* weight;  // [experts, features]
  const void* bias;    // [experts] or null
  float* gates;        // [rows, top_k], or [rows, experts] where top_k is 0
  int64_t* index;      // [rows, top_k]
  float* logits;       // [rows, experts]
  int rows, features, experts, top_k;
  bool wide;     // weight and bias are float32
  bool aligned;  // rows of x and weight start at multiples of 16 bytes

  ADAMIX_BOTH int blocks() const { return (rows + kRouterRows - 1) / kRouterRows; }
};

// Of `tiles` times eight experts at once: each warp's part of the sums, then the logits, then the largest of them.
struct RouterShared {
  float* parts;   // [kRouterWarps, kRouterRows, 8 * tiles]
  float* logits;  // [kRouterRows, experts]
  float* best;    // [kRouterRows, top_k]

  template <typename Memory>
  ADAMIX_BOTH RouterShared(Memory& memory, int tiles, int experts, int top_k) {
    parts = memory.template take<float>(kRouterWarps * kRouterRows * 8 * tiles);
    logits = memory.template take<float>(kRouterRows * experts);
    best = memory.template take<float>(kRouterRows * top_k);
  }
};

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_router(const Router<T>& params, const Device& device);
#endif

}  // namespace adamix
