// What a warp of one_pass.h keeps of both weight gradients, of the weights, and where the sums go.
#pragma once

#include "common/cluster.h"
#include "common/copy.h"
#include "routed_adapter/one_pass.h"
#include "routed_adapter/resident_tile.h"

namespace adamix {

// Where 16 bytes of a row lie: neither 8 rows of a piece nor 2 rows of 4 pieces share banks.
ADAMIX_DEVICE int pass_place(int row, int piece) {
  return row * kPassCols + (piece ^ ((row % 2) << 2 | (row / 2 % 4))) * 8;
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

  // += narrow^T wide over 16 rows. a: narrow, transposed; wide: the warp's tile.
  template <typename T>
  ADAMIX_DEVICE void add(const uint32_t (&a)[4], const T* wide) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t b[4];
      load_turned<0>(b, wide, 0, n * 16, [](int row, int piece) { return pass_place(row, piece); });
      multiply<T>(at[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
      multiply<T>(at[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
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
      float low = tile.values[2 * half], high = tile.values[2 * half + 1];
      if (!fresh) low += to[0], high += to[1];
      to[0] = low, to[1] = high;
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

// The weights of a warp's 64 columns as right operands of one side's product, in shared memory or read anew.
template <typename T, bool Keeps, bool Ranks>
struct PassWeights {
  Words* kept;  // [4, lanes] of a warp

  ADAMIX_DEVICE static void load(uint32_t (&w)[4][2], const ResidentBank<T>& bank, int c, int col0) {
    if constexpr (Ranks) {
      bank.load_cols(w, fragment_part() * 4, col0 - fragment_part() * 8 + c * kFragmentCols);
    } else {
      bank.load_rows(w, 0, col0 + c * kFragmentCols);
    }
    transpose_words(w);
  }

  // A lane reads what it has written alone.
  ADAMIX_DEVICE void keep(const ResidentBank<T>& bank, int col0) const {
    if constexpr (Keeps) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        uint32_t w[4][2];
        load(w, bank, c, col0);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          kept[(2 * c + u) * 32 + threadIdx.x % 32] = Words{{w[0][u], w[1][u], w[2][u], w[3][u]}};
        }
      }
    }
  }

  ADAMIX_DEVICE void get(uint32_t (&w)[4][2], const ResidentBank<T>& bank, int c, int col0) const {
    if constexpr (!Keeps) {
      load(w, bank, c, col0);
    } else {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        Words words = kept[(2 * c + u) * 32 + threadIdx.x % 32];
#pragma unroll
        for (int k = 0; k < 4; ++k) w[k][u] = words.at[k];
      }
    }
  }
};

}  // namespace adamix
