// Rows of [B, S, C] tensors and the experts that serve them.
#pragma once

#include "common/platform.h"

namespace adamix {

// A [B, S, C] tensor whose last axis is contiguous; strides are in elements, not bytes.
template <typename T>
struct Rows {
  T* data;
  int64_t batch_stride;
  int64_t token_stride;
  int tokens;    // S
  bool aligned;  // data and both strides are multiples of 16 bytes

  // Elements from `data` to row b * S + s.
  ADAMIX_BOTH int64_t offset(int64_t row) const {
    int64_t batch = row / tokens;
    return batch * batch_stride + (row - batch * tokens) * token_stride;
  }
};

// Which expert serves a row: ids[row / rows_per_id], int32 or int64; no ids: a bank of one.
struct Routing {
  const void* ids;
  bool wide;  // int64
  int rows_per_id;

  ADAMIX_DEVICE int expert(int64_t row) const {
    if (ids == nullptr) return 0;
    int64_t at = row / rows_per_id;
    return wide ? static_cast<int>(static_cast<const int64_t*>(ids)[at]) : static_cast<const int32_t*>(ids)[at];
  }
};

// No row: sorts behind every expert.
constexpr int kNoExpert = 0x7fffffff;

// The smallest expert above `previous` among experts[0..count), or kNoExpert; start with -1.
template <int Count>
ADAMIX_DEVICE int next_expert(const int* experts, int previous) {
  int next = kNoExpert;
  for (int i = 0; i < Count; ++i) {
    int expert = experts[i];
    if (expert > previous && expert < next) next = expert;
  }
  return next;
}

}  // namespace adamix
