// What a warp of one_pass.h keeps of both weight gradients, of the weights, and where the sums go.
#pragma once

#include "common/cluster.h"
#include "common/copy.h"
#include "common/one_pass.h"
#include "common/warp.h"
#include "common/words.h"

namespace adamix {

// Where 16 bytes of a row lie: neither 8 rows of a piece nor 2 rows of 4 pieces share banks.
ADAMIX_DEVICE int pass_place(int row, int piece) {
  return row * kPassCols + (piece ^ ((row % 2) << 2 | (row / 2 % 4))) * 8;
}

// The same of a row of 16 narrow values.
ADAMIX_DEVICE int narrow_place(int row, int piece) { return row * kFragmentRanks + (piece ^ (row / 4 % 2)) * 8; }

struct alignas(8) PassPair {
  float low, high;
};

// The row and the piece, of four 8 x 8 tiles, that this lane names in load_tiles and load_turned: tile w has rows from
// 8 on where bit `RowBit` of w is set, and the second piece where the other is.
template <int RowBit>
ADAMIX_DEVICE int tile_row() {
  int lane = threadIdx.x % 32;
  return 8 * (lane / 8 >> RowBit & 1) + lane % 8;
}
template <int RowBit>
ADAMIX_DEVICE int tile_piece() {
  return threadIdx.x % 32 / 8 >> (1 - RowBit) & 1;
}

// The same value, held in a register: left to itself, the compiler makes what depends on the lane alone for every tile
// anew.
ADAMIX_DEVICE void hold(int& value) {
#if ADAMIX_ARCH > 0
  asm volatile("" : "+r"(value));
#else
  (void)value;
#endif
}
ADAMIX_DEVICE void hold(uint32_t& value) {
#if ADAMIX_ARCH > 0
  asm volatile("" : "+r"(value));
#else
  (void)value;
#endif
}
template <typename T>
ADAMIX_DEVICE void hold(T*& value) {
#if ADAMIX_ARCH > 0
  asm volatile("" : "+l"(value));
#else
  (void)value;
#endif
}

// A place function for load_turned of pieces `piece` (even) and the next, which takes own = at(tile_row(),
// tile_piece()) where there are lanes: at(row, piece ^ n) == at(row, piece) ^ 8 n.
template <typename At>
ADAMIX_DEVICE auto placed(int own, int piece, At at) {
  return [=](int row, int of) {
#if defined(ADAMIX_HOST)
    (void)own, (void)piece;
    return at(row, of);
#else
    (void)row, (void)of, (void)at;
    return own ^ 8 * piece;
#endif
  };
}

// The four tiles as left operands are: word w is of tile w (RowBit 0), for lane 4 i + t its row i, columns 2 t and
// 2 t + 1. All lanes call.
template <typename T, typename At>
ADAMIX_DEVICE void load_tiles(uint32_t (&words)[4], const T* base, int own, int piece, At at) {
#if defined(ADAMIX_HOST)
  int lane = threadIdx.x % 32, i = lane / 4, t = lane % 4;
  for (int w = 0; w < 4; ++w) words[w] = load_words<uint32_t>(base + at(8 * (w & 1) + i, piece + (w >> 1)) + 2 * t);
  (void)own;
#elif ADAMIX_ARCH >= 750
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(base + placed(own, piece, at)(0, 0)));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
#endif
}

// Starts a lane's copies of a warp's tile of 16 rows: columns fragment_part() * 8 and 32 behind of row fragment_row(),
// at `upper`, and of the row 8 below. place: pass_place(fragment_row(), fragment_part()); left: rows that are there,
// from the lane's first on; of others zeros.
template <typename T>
ADAMIX_DEVICE void pass_copy(T* stage, int place, const T* upper, const T* lower, int left) {
  constexpr int kHalf = 8 * kPassCols;
  bool above = left > 0, below = left > 8;
  copy_async_or_zero(stage + place, upper, above);
  copy_async_or_zero(stage + (place ^ kFragmentCols), upper + kFragmentCols, above);
  copy_async_or_zero(stage + place + kHalf, lower, below);
  copy_async_or_zero(stage + (place ^ kFragmentCols) + kHalf, lower + kFragmentCols, below);
}

// The sums of 16 ranks (rows) by 64 columns that a warp holds for one side.
struct PassSums {
  float at[8][4];

  ADAMIX_DEVICE void clear() {
#pragma unroll
    for (auto& tile : at) {
#pragma unroll
      for (float& value : tile) value = 0.f;
    }
  }

  // += narrow^T wide over 16 rows. a: narrow, turned; wide: the warp's tile; own: see load_tiles; visit(n, b): with the
  // right operands of columns 16 n to 16 n + 15.
  template <typename T, typename Visit>
  ADAMIX_DEVICE void add(const uint32_t (&a)[4], const T* wide, int own, Visit visit) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t b[4];
      load_turned<0>(b, wide, 0, 16 * n, placed(own, 2 * n, pass_place));
      multiply<T>(at[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
      multiply<T>(at[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      visit(n, b);
    }
  }

  // plane[rank][col] = the sums, or += them.
  ADAMIX_DEVICE void leave(float* plane, int ranks, int cols, bool fresh) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      leave_tile(plane, ranks, cols, fresh, n, Piece<float>{{at[n][0], at[n][1], at[n][2], at[n][3]}});
    }
  }

  // Tile n, 16 ranks by 8 columns, of them.
  static ADAMIX_DEVICE void leave_tile(float* plane, int ranks, int cols, bool fresh, int n, Piece<float> tile) {
    int col = static_cast<int>(threadIdx.x) / 32 * kPassCols + fragment_part() * 2 + 8 * n;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int rank = fragment_row() + 8 * half;
      if (rank >= ranks) continue;
      float* to = plane + static_cast<int64_t>(rank) * cols + col;
      PassPair sum{tile.values[2 * half], tile.values[2 * half + 1]};
      if (!fresh) {
        PassPair held = load_words<PassPair>(to);
        sum = {sum.low + held.low, sum.high + held.high};
      }
      store_words(to, sum);
    }
  }
};

// The sums of a warp's 64 columns over rows, two parts a column: of columns 16 n + fragment_row() (values 0 and 2), and
// 8 behind (1 and 3).
struct PassColumnSums {
  float at[4][4];

  ADAMIX_DEVICE void clear() {
#pragma unroll
    for (auto& tile : at) {
#pragma unroll
      for (float& value : tile) value = 0.f;
    }
  }

  // += the sums over 16 rows, of which PassSums::add has the right operands b. As they lie they are left ones too,
  // whose inner indices from 8 on are columns 8 and on: ones in the right places of the other operand keep them apart.
  template <typename T>
  ADAMIX_DEVICE void add(int n, const uint32_t (&b)[4], const TwoWords& apart) {
    multiply<T>(at[n], b[0], b[1], b[2], b[3], apart.at[0], apart.at[1]);
  }
  template <typename T>
  static ADAMIX_DEVICE TwoWords apart() {
    TwoWords words{{fragment_row() % 2 == 0 ? ones<T>() : 0, fragment_row() % 2 == 0 ? 0 : ones<T>()}};
    hold(words.at[0]), hold(words.at[1]);
    return words;
  }
  template <typename T>
  static constexpr ADAMIX_BOTH uint32_t ones() {
    return kIsHalf<T> ? 0x3c003c00u : 0x3f803f80u;
  }

  // visit(col, the sum) for the warp's columns, by one lane each.
  template <typename Visit>
  ADAMIX_DEVICE void each(Visit visit) const {
    if (fragment_part() != 0) return;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      visit(16 * n + fragment_row(), at[n][0] + at[n][2]);
      visit(16 * n + 8 + fragment_row(), at[n][1] + at[n][3]);
    }
  }
};

// A side's place in the planes of this block.
struct PassSlots {
  int* experts;  // [slots] in shared memory
  float* planes;
  int64_t size;

  // The expert's own slot, or the first free one.
  ADAMIX_DEVICE int find(int expert) const {
    int slot = 0;
    while (experts[slot] != expert && experts[slot] != kNoExpert) ++slot;
    return slot;
  }

  // Calls leave(plane, fresh) with the plane of an expert. All threads call.
  template <typename Leave>
  ADAMIX_DEVICE void flush(int expert, Leave leave) const {
    int slot = find(expert);
    bool fresh = experts[slot] == kNoExpert;
    leave(planes + slot * size, fresh);
    __syncthreads();
    if (threadIdx.x == 0) experts[slot] = expert;
    __syncthreads();
  }
};

// The weights of a warp's 64 columns as right operands of one side's product, in shared memory or read anew: operand i
// of the four has two products of 8 columns of results each, words 0 and 1 and words 2 and 3.
//
// Up: of grad_out's pieces 2 i and 2 i + 1, as load_tiles has them; a lane's sums are of ranks 4 t to 4 t + 3.
// Down: of ranks as load_tiles has them; a lane's sums are of columns 8 t + 4 (i % 2) on, from column 32 (i / 2) on.
template <typename T, bool Keeps, bool Up>
struct PassWeights {
  Words* kept;    // [4, lanes] of a warp
  const T* data;  // the expert's: [cols, ranks], or [ranks, cols]
  int cols, ranks;

  ADAMIX_DEVICE Words load(int i) const {
    Words of;
    int col0 = static_cast<int>(threadIdx.x) / 32 * kPassCols, rank = fragment_part() * 4;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if constexpr (Up) {
        TwoWords words{};
        int col = col0 + (2 * i + u) * 8 + fragment_row();
        if (rank < ranks) words = *reinterpret_cast<const TwoWords*>(data + col * ranks + rank);
        of.at[u] = transposed(words.at[0]), of.at[2 + u] = transposed(words.at[1]);
      } else {
        TwoWords words{};
        int row = fragment_row() + 8 * u, col = col0 + i / 2 * kFragmentCols + fragment_part() * 8 + i % 2 * 4;
        if (row < ranks) words = *reinterpret_cast<const TwoWords*>(data + row * cols + col);
        of.at[u] = transposed(words.at[0]), of.at[2 + u] = transposed(words.at[1]);
      }
    }
    return of;
  }

  // Of another expert. A lane reads what it has written alone.
  ADAMIX_DEVICE void take(const T* bank, int expert) {
    data = bank + static_cast<int64_t>(expert) * cols * ranks;
    if constexpr (Keeps) {
#pragma unroll
      for (int i = 0; i < 4; ++i) kept[i * 32 + threadIdx.x % 32] = load(i);
    }
  }

  ADAMIX_DEVICE Words get(int i) const {
    if constexpr (Keeps) return kept[i * 32 + threadIdx.x % 32];
    return load(i);
  }
};

}  // namespace adamix
