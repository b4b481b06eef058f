// e^x by powers of two.
#pragma once

#include "common/dtype.h"

namespace adamix {

// 2^x by the hardware, within 2^-22 of itself.
ADAMIX_DEVICE float power_of_2(float x) {
#if defined(ADAMIX_HOST)
  return std::exp2(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// log2 x of x >= 2^-126 by the hardware, within 2^-22 of itself or of 1.
ADAMIX_DEVICE float power_of(float x) {
#if defined(ADAMIX_HOST)
  return std::log2(x);
#else
  return __log2f(x);
#endif
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// e^u for u <= 0, of logits in T: for 16-bit ones the product's rounding stays, |u| 2^-24 of the result.
template <typename T>
ADAMIX_DEVICE float exp_of(float u) {
  constexpr float kLog2ERest = 1.925963033500943e-8f;
  float power = u * kLog2E, result = power_of_2(power);
  if constexpr (sizeof(T) == 2) return result;
  float rest = fmaf(u, kLog2ERest, fmaf(u, kLog2E, -power));
  return result == 0.f ? result : fmaf(result, rest * kLn2, result);
}

// x y, which no compiler makes one operation of with a sum behind it.
ADAMIX_DEVICE float rounded_product(float x, float y) {
#if defined(ADAMIX_HOST)
  return x * y;
#else
  return __fmul_rn(x, y);
#endif
}

// e^(x - top) of 16-bit logits by one product: 2^(x log2 e - lift) times rest(), which is 1 but for the lift's
// rounding.
struct Lifted {
  float lift, slip;
  ADAMIX_DEVICE explicit Lifted(float top) : lift(rounded_product(top, kLog2E)), slip(fmaf(top, kLog2E, -lift)) {}
  ADAMIX_DEVICE float power(float x) const { return fmaf(x, kLog2E, -lift); }
  ADAMIX_DEVICE float rest() const { return power_of_2(-slip); }
};

// Beyond (tops of about 700, and what is no number) a lift's rounding changes a gradient by more than 2^-14 of itself.
ADAMIX_DEVICE bool may_be_lifted(float slip) { return fabsf(slip) < 6.1e-5f; }

}  // namespace adamix
