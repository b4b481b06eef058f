// Pieces of 16 bytes to and from memory that may be neither aligned nor whole.
#pragma once

#include "common/dtype.h"

namespace adamix {

// 16 bytes in one store to global memory: left to itself, the compiler takes some of them apart.
ADAMIX_DEVICE void store_whole(void* target, uint4 value) {
#if defined(ADAMIX_HOST)
  *static_cast<uint4*>(target) = value;
#else
  __stwb(static_cast<uint4*>(target), value);
#endif
}

// target[0..size) = piece, for the first `valid` elements.
template <typename T>
ADAMIX_DEVICE void store_piece(T* target, const Piece<T>& piece, int valid, bool aligned) {
  if (aligned && valid >= Piece<T>::kSize) {
    *reinterpret_cast<Piece<T>*>(target) = piece;
    return;
  }
#pragma unroll
  for (int e = 0; e < Piece<T>::kSize; ++e) {
    if (e < valid) target[e] = piece.values[e];
  }
}

// The first `valid` elements at `source`, then zeros.
template <typename T>
ADAMIX_DEVICE Piece<T> load_piece(const T* source, int valid, bool aligned) {
  if (aligned && valid >= Piece<T>::kSize) return *reinterpret_cast<const Piece<T>*>(source);
  Piece<T> piece;
#pragma unroll
  for (int e = 0; e < Piece<T>::kSize; ++e) piece.values[e] = e < valid ? source[e] : from_float<T>(0.f);
  return piece;
}

}  // namespace adamix
