// Global to shared memory: asynchronous 16-byte copies where alignment allows, single elements elsewhere.
#pragma once

#include "common/dtype.h"

namespace adamix {

// Starts a copy of 16 aligned bytes; it is complete, for this thread, after copy_wait.
ADAMIX_DEVICE void copy_async(void* shared, const void* global) {
#if defined(ADAMIX_HOST)
  host::copy_async(shared, global);
#elif ADAMIX_ARCH >= 800
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
  // No read-only load: the kernel may write what it has copied, as losses do in the place of their logits.
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// The same where `keep`; else 16 zero bytes, and global is not read.
ADAMIX_DEVICE void copy_async_or_zero(void* shared, const void* global, bool keep) {
#if !defined(ADAMIX_HOST) && ADAMIX_ARCH >= 800
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(keep ? 16 : 0)
               : "memory");
#else
  if (keep) {
    copy_async(shared, global);
  } else {
    *static_cast<uint4*>(shared) = uint4{0, 0, 0, 0};
  }
#endif
}

// Closes the group of copies started since the last call.
ADAMIX_DEVICE void copy_commit() {
#if defined(ADAMIX_HOST)
  host::copy_commit();
#elif ADAMIX_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's groups are incomplete. Other threads' copies need a barrier too.
template <int Pending>
ADAMIX_DEVICE void copy_wait() {
#if defined(ADAMIX_HOST)
  host::copy_wait(Pending);
#elif ADAMIX_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Elements between the rows of a tile in shared memory: 16 bytes more than it needs, against bank conflicts.
template <typename T>
ADAMIX_BOTH constexpr int pitch_of(int cols) {
  return cols + 16 / static_cast<int>(sizeof(T));
}

// tile[row][col] = keep(row) && col < valid_cols ? source[offset(row) + col] : 0 for a [Rows, Cols] tile.
//
// source: nothing that this kernel writes. aligned: source, and every offset kept, is a multiple of 16 bytes. Every
// thread of the block calls; the tile is complete after copy_commit, copy_wait and a barrier.
template <int Rows, int Cols, int Threads, typename T, typename Offset, typename Keep>
ADAMIX_DEVICE void load_tile(T* tile, const T* source, Offset offset, Keep keep, int valid_cols, bool aligned) {
  constexpr int kSize = Piece<T>::kSize;
  constexpr int kPieces = Cols / kSize;
  static_assert(Cols % kSize == 0, "a row is a whole number of 16-byte pieces");
#if ADAMIX_ARCH > 0 && ADAMIX_ARCH < 800
  // Without asynchronous copies, all pieces of a thread are under way before it stores the first.
  if constexpr (Rows * kPieces % Threads == 0) {
    if (aligned && valid_cols >= Cols) {
      uint4 pieces[Rows * kPieces / Threads];
#pragma unroll
      for (int i = 0; i < Rows * kPieces / Threads; ++i) {
        int at = i * Threads + threadIdx.x, row = at / kPieces;
        const T* from = source + offset(row) + at % kPieces * kSize;
        pieces[i] = keep(row) ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (int i = 0; i < Rows * kPieces / Threads; ++i) {
        int at = i * Threads + threadIdx.x;
        *reinterpret_cast<uint4*>(tile + at / kPieces * pitch_of<T>(Cols) + at % kPieces * kSize) = pieces[i];
      }
      return;
    }
  }
#endif
  for (int i = threadIdx.x; i < Rows * kPieces; i += Threads) {
    int row = i / kPieces, col = i % kPieces * kSize;
    T* target = tile + row * pitch_of<T>(Cols) + col;
    if (!keep(row) || col >= valid_cols) {
      *reinterpret_cast<Piece<T>*>(target) = Piece<T>{};
      continue;
    }
    const T* from = source + offset(row) + col;
    if (aligned && col + kSize <= valid_cols) {
      copy_async(target, from);
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < kSize; ++e) target[e] = col + e < valid_cols ? from[e] : from_float<T>(0.f);
  }
}

// Replaces tile[row][col] by change(value, row, col) in the pieces that this thread loaded with load_tile, after
// its own copy_wait and before the barrier.
template <int Rows, int Cols, int Threads, typename T, typename Change>
ADAMIX_DEVICE void change_tile(T* tile, Change change) {
  constexpr int kSize = Piece<T>::kSize;
  constexpr int kPieces = Cols / kSize;
  for (int i = threadIdx.x; i < Rows * kPieces; i += Threads) {
    int row = i / kPieces, col = i % kPieces * kSize;
    Piece<T>* target = reinterpret_cast<Piece<T>*>(tile + row * pitch_of<T>(Cols) + col);
    Piece<T> piece = *target;
#pragma unroll
    for (int e = 0; e < kSize; ++e) piece.values[e] = from_float<T>(change(to_float(piece.values[e]), row, col + e));
    *target = piece;
  }
}

}  // namespace adamix
