// Element types: fp32, fp16, bf16; all arithmetic is done in float, with one rounding to the element type.
#pragma once

#include "common/platform.h"

namespace adamix {

#if defined(ADAMIX_HOST)
ADAMIX_DEVICE float to_float(half v) { return host::widen(v); }
ADAMIX_DEVICE float to_float(bfloat16 v) { return host::widen(v); }
template <typename T>
ADAMIX_DEVICE T from_float(float v) {
  return host::narrow<T>(v);
}
#else
using half = __half;
using bfloat16 = __nv_bfloat16;
ADAMIX_DEVICE float to_float(half v) { return __half2float(v); }
ADAMIX_DEVICE float to_float(bfloat16 v) { return __bfloat162float(v); }
template <typename T>
ADAMIX_DEVICE T from_float(float v);
template <>
ADAMIX_DEVICE half from_float<half>(float v) {
  return __float2half_rn(v);
}
template <>
ADAMIX_DEVICE bfloat16 from_float<bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
ADAMIX_DEVICE float from_float<float>(float v) {
  return v;
}
#endif
ADAMIX_DEVICE float to_float(float v) { return v; }

ADAMIX_DEVICE float float_of_bits(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both{bits};
  return both.value;
}
ADAMIX_DEVICE float not_a_number() { return float_of_bits(0x7fffffffu); }

// 16 bytes, the widest access of one thread.
template <typename T>
struct alignas(16) Piece {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

enum class DType : int { kFloat, kHalf, kBFloat16 };

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the element type of `dtype`.
template <typename Body>
void dispatch(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat:
      return body(Type<float>{});
    case DType::kHalf:
      return body(Type<half>{});
    case DType::kBFloat16:
      return body(Type<bfloat16>{});
  }
}
#endif

}  // namespace adamix
