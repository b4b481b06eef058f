// Division by a number that a launch knows: two instructions, where hardware has none for it.
#pragma once

#include "common/platform.h"

namespace adamix {

// n / by for 0 <= n < 2^31, after Granlund and Montgomery, "Division by invariant integers using multiplication"
// (1994): magic = ceil(2^(31 + shift) / by) with 2^shift >= by, so that n * magic / 2^(31 + shift) exceeds n / by by
// less than 1 / by. An empty one divides by nothing: see `divisor`.
struct Divisor {
  uint32_t by, magic;
  int shift;

  ADAMIX_BOTH uint32_t quotient(uint32_t n) const {
#if ADAMIX_ARCH > 0
    return __umulhi(2 * n, magic) >> shift;
#else
    return static_cast<uint32_t>(static_cast<uint64_t>(2 * n) * magic >> 32) >> shift;
#endif
  }
};

// For 1 <= by < 2^31.
ADAMIX_BOTH Divisor divisor(int by) {
  int shift = 0;
  while ((int64_t{1} << shift) < by) ++shift;
  return {static_cast<uint32_t>(by), static_cast<uint32_t>(((int64_t{1} << (31 + shift)) + by - 1) / by), shift};
}

}  // namespace adamix
