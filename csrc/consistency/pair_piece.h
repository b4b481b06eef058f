// Pieces of 16 bytes of a row: their maxima, two elements at a time, and pieces that lie across two aligned ones.
#pragma once

#include "common/dtype.h"

// ADAMIX_IS_GLOBAL: of its pointers a called function, or a loop whose rows come out of shared memory, does not see it.
#if defined(ADAMIX_HOST)
#define ADAMIX_CALLED
#define ADAMIX_IS_GLOBAL(pointer)
#else
#define ADAMIX_CALLED __device__ __noinline__
#define ADAMIX_IS_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#endif

namespace adamix {

ADAMIX_DEVICE float negative_infinity() { return float_of_bits(0xff800000u); }

template <typename T>
ADAMIX_DEVICE Piece<T> filled(float value) {
  Piece<T> piece;
#pragma unroll
  for (int e = 0; e < Piece<T>::kSize; ++e) piece.values[e] = from_float<T>(value);
  return piece;
}

// values[at] = value for an `at` that no compiler knows.
template <typename T>
ADAMIX_DEVICE void put(Piece<T>& piece, int at, T value) {
#pragma unroll
  for (int e = 0; e < Piece<T>::kSize; ++e) piece.values[e] = e == at ? value : piece.values[e];
}

// Elements e and e + 1 in one conversion, where there is one; e is even.
template <typename T>
ADAMIX_DEVICE void set_two(Piece<T>& piece, int e, float x, float y) {
  piece.values[e] = from_float<T>(x), piece.values[e + 1] = from_float<T>(y);
}
#if !defined(ADAMIX_HOST)
ADAMIX_DEVICE void set_two(Piece<half>& piece, int e, float x, float y) {
  *reinterpret_cast<__half2*>(piece.values + e) = __floats2half2_rn(x, y);
}
ADAMIX_DEVICE void set_two(Piece<bfloat16>& piece, int e, float x, float y) {
  *reinterpret_cast<__nv_bfloat162*>(piece.values + e) = __floats2bfloat162_rn(x, y);
}
#endif

// Elements e and e + 1, e even: those of bfloat16 in one instruction each.
template <typename T>
ADAMIX_DEVICE void get_two(const Piece<T>& piece, int e, float& x, float& y) {
  x = to_float(piece.values[e]), y = to_float(piece.values[e + 1]);
}
#if !defined(ADAMIX_HOST)
ADAMIX_DEVICE void get_two(const Piece<bfloat16>& piece, int e, float& x, float& y) {
  uint32_t both = *reinterpret_cast<const uint32_t*>(piece.values + e);
  x = float_of_bits(both << 16), y = float_of_bits(both & 0xffff0000u);
}
#endif

// The largest element of all pieces added; NaN is passed over, the sums of exp find it.
template <typename T>
struct PieceTop {
  float top = negative_infinity();

  ADAMIX_DEVICE void add(const Piece<T>& piece) {
#pragma unroll
    for (int e = 0; e < Piece<T>::kSize; ++e) top = fmaxf(top, to_float(piece.values[e]));
  }
  ADAMIX_DEVICE float value() const { return top; }
};

#if ADAMIX_ARCH >= 800
// Two elements a maximum.
template <typename T, typename Two>
struct PieceTopOfTwo {
  Two top;

  ADAMIX_DEVICE explicit PieceTopOfTwo(Two lowest) : top(lowest) {}
  ADAMIX_DEVICE void add(const Piece<T>& piece) {
    const Two* two = reinterpret_cast<const Two*>(piece.values);
#pragma unroll
    for (int e = 0; e < Piece<T>::kSize / 2; ++e) top = __hmax2(top, two[e]);
  }
  ADAMIX_DEVICE float value() const { return fmaxf(to_float(top.x), to_float(top.y)); }
};
template <>
struct PieceTop<half> : PieceTopOfTwo<half, __half2> {
  ADAMIX_DEVICE PieceTop() : PieceTopOfTwo(__float2half2_rn(negative_infinity())) {}
};
template <>
struct PieceTop<bfloat16> : PieceTopOfTwo<bfloat16, __nv_bfloat162> {
  ADAMIX_DEVICE PieceTop() : PieceTopOfTwo(__float2bfloat162_rn(negative_infinity())) {}
};
#endif

// The 16 bytes at `bytes`, an even number, of the 32 of both pieces.
template <typename T>
ADAMIX_DEVICE Piece<T> across(const Piece<T>& first, const Piece<T>& second, int bytes) {
  union {
    Piece<T> pieces[2];
    uint32_t words[8];
  } from{{first, second}};
  union {
    uint32_t words[4];
    Piece<T> piece;
  } to;
  bool eight = bytes & 8, four = bytes & 4;
  int bits = bytes % 4 * 8;
#pragma unroll
  for (int i = 0; i < 6; ++i) from.words[i] = eight ? from.words[i + 2] : from.words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) from.words[i] = four ? from.words[i + 1] : from.words[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if defined(ADAMIX_HOST)
    uint64_t both = static_cast<uint64_t>(from.words[i + 1]) << 32 | from.words[i];
    to.words[i] = static_cast<uint32_t>(both >> bits);
#else
    to.words[i] = __funnelshift_r(from.words[i], from.words[i + 1], bits);
#endif
  }
  return to.piece;
}

// 16 bytes that lie at any element. On a GPU both aligned pieces that they touch are read, which must be readable;
// others may be writing what is not asked for.
template <typename T>
ADAMIX_DEVICE Piece<T> load_across(const T* at) {
#if defined(ADAMIX_HOST)
  Piece<T> piece;
  for (int e = 0; e < Piece<T>::kSize; ++e) piece.values[e] = at[e];
  return piece;
#else
  int bytes = static_cast<int>(reinterpret_cast<uintptr_t>(at) % 16);
  const Piece<T>* from = reinterpret_cast<const Piece<T>*>(reinterpret_cast<const char*>(at) - bytes);
  return across(from[0], from[1], bytes);
#endif
}

// Elements [col, col + size) of a row, with -inf where it has none, and back; calls, as they are rare and long.
template <typename T>
ADAMIX_CALLED Piece<T> load_elements(const T* row, int col, int classes) {
  ADAMIX_IS_GLOBAL(row);
  Piece<T> values;
#pragma unroll
  for (int e = 0; e < Piece<T>::kSize; ++e) {
    values.values[e] = col + e >= 0 && col + e < classes ? row[col + e] : from_float<T>(negative_infinity());
  }
  return values;
}
template <typename T>
ADAMIX_CALLED void store_elements(T* row, Piece<T> values, int col, int classes) {
  ADAMIX_IS_GLOBAL(row);
#pragma unroll
  for (int e = 0; e < Piece<T>::kSize; ++e) {
    if (col + e >= 0 && col + e < classes) row[col + e] = values.values[e];
  }
}

}  // namespace adamix
