// Stateless dropout: the mask of adamix_kernels/ops/_dropout.py, bit for bit, a function of (seed, row, column).
#pragma once

#include "common/platform.h"

namespace adamix {

struct Dropout {
  const int64_t* seed;  // where the kernels run; null: nothing is dropped
  uint32_t threshold;   // floor(p * 2^32)
  float scale;          // 1 / (1 - p)
};

class DropoutMask {
 public:
  ADAMIX_DEVICE explicit DropoutMask(const Dropout& dropout)
      : drops_(dropout.seed != nullptr), threshold_(dropout.threshold), scale_(dropout.scale), a_(0), b_(0) {
    if (!drops_) return;
    uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    a_ = mix(mix(low + 0x9E3779B9u) ^ high);
    b_ = mix(mix(high + 0x7F4A7C15u) ^ low);
  }

  ADAMIX_DEVICE bool drops() const { return drops_; }

  // What all elements of a row share, and eight neighbours of a column.
  struct RowKeys {
    uint32_t factor, offset;
  };
  struct EightColumns {
    uint32_t at[8];
    ADAMIX_DEVICE explicit EightColumns(int first) {
      for (int e = 0; e < 8; ++e) at[e] = of_column(first + e);
    }
  };
  ADAMIX_DEVICE RowKeys of_row(int64_t row) const {
    uint32_t low = static_cast<uint32_t>(row), high = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
    return {mix(mix(a_ ^ low) ^ high) | 1u, mix(mix(b_ + low) + high)};
  }

  // Eight 16-bit elements of a row, zero in the place of each that is dropped; not scaled.
  ADAMIX_DEVICE uint4 kept(uint4 piece, const RowKeys& row, const EightColumns& columns) const {
    uint32_t* const words[4] = {&piece.x, &piece.y, &piece.z, &piece.w};
    for (int e = 0; e < 8; ++e) {
      if (row.factor * columns.at[e] + row.offset < threshold_) *words[e / 2] &= e % 2 == 0 ? 0xffff0000u : 0xffffu;
    }
    return piece;
  }

  // value / (1 - p) where the element is kept, 0 where it is dropped, whatever the value.
  ADAMIX_DEVICE float apply(float value, int64_t row, int col) const {
    RowKeys keys = of_row(row);
    return keys.factor * of_column(col) + keys.offset >= threshold_ ? value * scale_ : 0.f;
  }

 private:
  static ADAMIX_DEVICE uint32_t of_column(int col) {
    uint32_t t = static_cast<uint32_t>(col) * 0x9E3779B9u;
    return t ^ (t * t | 1u);
  }

  // The finaliser of MurmurHash3 (Austin Appleby, public domain).
  static ADAMIX_DEVICE uint32_t mix(uint32_t h) {
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    return h ^ (h >> 16);
  }

  bool drops_;
  uint32_t threshold_;
  float scale_;
  uint32_t a_, b_;
};

}  // namespace adamix
