// Floating-point formats and PTX's rules for them.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine.h"

namespace ptx {

inline float as_float(u32 v) {
  float r;
  memcpy(&r, &v, 4);
  return r;
}

inline u32 as_bits(float x) {
  u32 v;
  memcpy(&v, &x, 4);
  return v;
}

// .ftz: what is too small for a normal number is a zero of its sign.
inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

struct Half {
  static float widen(u16 bits) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return static_cast<float>(h);
  }
  static u16 narrow(double x) {
    if (std::isnan(x)) return 0x7fff;
    _Float16 h = static_cast<_Float16>(x);
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
  }
};

struct Bfloat {
  static float widen(u16 bits) { return as_float(static_cast<u32>(bits) << 16); }
  static u16 narrow(double wide) {
    if (std::isnan(wide)) return 0x7fff;
    float x = static_cast<float>(wide);
    u32 v = as_bits(x);
    if (std::isinf(x)) return static_cast<u16>(v >> 16);
    // A tie that float32's own rounding made is none.
    bool tie = (v & 0xffff) == 0x8000;
    if (tie && wide != x) return static_cast<u16>((v >> 16) + (std::fabs(wide) > std::fabs(x)));
    return static_cast<u16>((v + 0x7fff + (v >> 16 & 1)) >> 16);
  }
};

// The matrix units read the top 19 bits of a float32.
inline float cut_to_tf32(u32 v) { return as_float(v & 0xffffe000u); }

template <class T>
T larger(T a, T b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

template <class T>
T smaller(T a, T b) {
  return -larger(-a, -b);
}

inline float larger_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? as_float(0x7fffffff) : larger(a, b);
}

inline float smaller_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? as_float(0x7fffffff) : smaller(a, b);
}

// A conversion to an integer keeps to its limits; NaN gives 0, or the lowest of 64 bits.
template <class T>
T saturate(double x) {
  if (std::isnan(x)) return sizeof(T) == 8 ? static_cast<T>(1ull << 63) : 0;
  if (x <= static_cast<double>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (x >= static_cast<double>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}

}  // namespace ptx
