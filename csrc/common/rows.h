// Rows of [B, S, C] tensors and the experts that serve them.
#pragma once

#include "common/divisor.h"

namespace adamix {

// No row, or one that no expert may serve: sorts behind every expert.
constexpr int kNoExpert = 0x7fffffff;

// A [B, S, C] tensor whose last axis is contiguous; strides are in elements, not bytes.
template <typename T>
struct Rows {
  T* data;
  int64_t batch_stride;
  int64_t token_stride;
  Divisor tokens;  // S
  bool aligned;    // data and both strides are multiples of 16 bytes

  // Elements from `data` to row b * S + s.
  ADAMIX_BOTH int64_t offset(int row) const {
    int batch = tokens.quotient(row);
    return batch * batch_stride + (row - batch * static_cast<int>(tokens.by)) * token_stride;
  }
};

// Which expert serves a row: ids[row / rows_per_id], int32 or int64; no ids: a bank of one.
struct Routing {
  const void* ids;
  bool wide;  // int64
  Divisor rows_per_id;
  uint32_t experts;  // in the bank

  // kNoExpert for an id outside the bank.
  ADAMIX_DEVICE int expert(int row) const {
    if (ids == nullptr) return 0;
    uint32_t at = rows_per_id.quotient(row);
    uint64_t id = wide ? static_cast<const uint64_t*>(ids)[at]
                       : static_cast<uint64_t>(static_cast<int64_t>(static_cast<const int32_t*>(ids)[at]));
    return id < experts ? static_cast<int>(id) : kNoExpert;
  }
};

}  // namespace adamix
