// 16, 8 and 4 bytes at a time, and the addresses they lie at.
#pragma once

#include "common/fragments.h"

namespace adamix {

// 16, 8 or 4 bytes at `at`, which is a multiple of that.
template <typename Words, typename T>
ADAMIX_DEVICE Words load_words(const T* at) {
  return *reinterpret_cast<const Words*>(at);
}
template <typename Words, typename T>
ADAMIX_DEVICE void store_words(T* at, Words words) {
  *reinterpret_cast<Words*>(at) = words;
}

// 16 bytes of global memory, `bytes` behind `at`: one address is kept for many places. Spelled out, as nvcc takes the
// store apart where it is conditional.
template <typename T>
ADAMIX_DEVICE uint4 load_piece_at(const T* at, int64_t bytes) {
  return *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(at) + bytes);
}
template <typename T>
ADAMIX_DEVICE void store_piece_at(T* at, int64_t bytes, uint4 piece) {
  char* to = reinterpret_cast<char*>(at) + bytes;
#if ADAMIX_ARCH > 0
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(piece.x), "r"(piece.y), "r"(piece.z),
               "r"(piece.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = piece;
#endif
}

// The same value, which the compiler takes for another one: what follows from it is not computed ahead of a loop, to be
// held in registers.
ADAMIX_DEVICE void forget(int64_t& value) {
#if ADAMIX_ARCH > 0
  asm volatile("" : "+l"(value));
#else
  (void)value;
#endif
}
ADAMIX_DEVICE void forget(uint4& piece) {
#if ADAMIX_ARCH > 0
  asm volatile("" : "+r"(piece.x), "+r"(piece.y), "+r"(piece.z), "+r"(piece.w));
#else
  (void)piece;
#endif
}

}  // namespace adamix
