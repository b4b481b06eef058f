// Both products of a tile of rows that stays in registers: it is read once, and what is made of it written once.
//
// A warp has the same columns of every row of the tile. narrow = tile A^T is summed over the warps through shared
// memory; out = tile + narrow' B then needs no other columns of the tile than the warp's own. A tile that several
// experts serve is multiplied by each of them, and every row keeps its own expert's result: a mask, where a gate could
// stand.
#pragma once

#include "common/tile_rows.h"
#include "common/words.h"

namespace adamix {

constexpr int kResidentThreads = 512;  // at most, of a block

// An expert's weights: [ranks, cols], or [cols, ranks] where ranks come last; ranks are a multiple of 4.
template <typename T>
struct ResidentBank {
  const T* data;
  int cols, ranks;

  // Words w[k][u] of a right operand from [ranks, cols]: ranks rank0 + spread_row(4) + 2 u, columns col + 2 k, + 1.
  ADAMIX_DEVICE void load_rows(uint32_t (&w)[4][2], int rank0, int col) const {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      int rank = rank0 + spread_row(4) + 2 * u;
      Words words{};
      if (rank < ranks) words = *reinterpret_cast<const Words*>(data + (rank * cols + col));
#pragma unroll
      for (int k = 0; k < 4; ++k) w[k][u] = words.at[k];
    }
  }

  // From [cols, ranks]: columns col + spread_row(8) + 2 k, ranks rank + 2 u, + 1.
  ADAMIX_DEVICE void load_cols(uint32_t (&w)[4][2], int rank, int col) const {
    const char* at = reinterpret_cast<const char*>(data + ((col + spread_row(8)) * ranks + rank));
    auto apart = static_cast<uint32_t>(2 * sizeof(T)) * static_cast<uint32_t>(ranks);
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
      TwoWords words{};
      if (rank < ranks) words = *reinterpret_cast<const TwoWords*>(at + uint64_t{apart} * k);
      w[k][0] = words.at[0], w[k][1] = words.at[1];
    }
  }
};

// 0, which the compiler takes for any number: what is made with it is made where this stands, not before a loop around
// it, in more registers. The assembler knows better.
ADAMIX_DEVICE uint32_t hidden_zero() {
  uint32_t zero = 0;
#if ADAMIX_ARCH > 0
  asm volatile("mov.b32 %0, 0;" : "=r"(zero));
#endif
  return zero;
}

ADAMIX_DEVICE void transpose_words(uint32_t (&w)[4][2]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    w[k][0] = transposed(w[k][0]);
    w[k][1] = transposed(w[k][1]);
  }
}

// 16 bytes of global memory, `bytes` behind `at`, where `keep`. Spelled out, as nvcc makes a jump of it.
template <typename T>
ADAMIX_DEVICE void store_piece_if(uint32_t keep, T* at, int64_t bytes, uint4 piece) {
#if ADAMIX_ARCH > 0
  asm volatile(
      "{\n\t.reg .pred kept;\n\tsetp.ne.u32 kept, %5, 0;\n\t@kept st.global.v4.u32 [%0], {%1, %2, %3, %4};\n\t}" ::"l"(
          reinterpret_cast<char*>(at) + bytes),
      "r"(piece.x), "r"(piece.y), "r"(piece.z), "r"(piece.w), "r"(keep)
      : "memory");
#else
  if (keep != 0) store_piece_at(at, bytes, piece);
#endif
}

// Shared memory of a block of `warps` warps.
template <typename T, int Groups>
struct ResidentMemory {
  static constexpr int kRows = Groups * kFragmentRows;
  float* sums;       // [warps, kRows, 16], one rank after another
  uint32_t* narrow;  // [ranks / 16, Groups, 32 lanes, 4]: two ranks in a word, as left operands lie in registers
  int* narrow_expert;
  int* wide_expert;

  template <typename Memory>
  ADAMIX_BOTH ResidentMemory(Memory& memory, int warps, int ranks)
      : sums(memory.template take<float>(warps * kRows * kFragmentRanks)),
        narrow(memory.template take<uint32_t>(ceil_div(ranks, kFragmentRanks) * kRows * 8)),
        narrow_expert(memory.template take<int>(kRows)),
        wide_expert(memory.template take<int>(kRows)) {}

  // Where ranks 2 pair and 2 pair + 1 of 16 lie, of a row of the tile: words 0 to 3 of a lane are its upper row's and
  // its lower row's first, then their second.
  static ADAMIX_DEVICE int narrow_place(int row, int pair) {
    return row / 16 * 128 + row % 8 * 16 + pair / 2 * 4 + pair % 2 * 2 + row / 8 % 2;
  }
};

// The experts of a tile's rows.
struct ResidentExperts {
  const int *narrow, *wide;
  int first_narrow, first_wide;  // of the tile's first row
  bool mixed;                    // others serve other rows

  // All threads call; complete on return.
  template <typename Memory>
  ADAMIX_DEVICE void find(const Memory& memory, int rows, int first, int count, const Routing& of_narrow,
                          const Routing& of_wide) {
    narrow = memory.narrow_expert, wide = memory.wide_expert;
    first_narrow = of_narrow.expert(first), first_wide = of_wide.expert(first);
    if (first_narrow == kNoExpert || first_wide == kNoExpert) first_narrow = first_wide = kNoExpert;
    bool differs = false;
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      int a = row < count ? of_narrow.expert(first + row) : kNoExpert;
      int b = row < count ? of_wide.expert(first + row) : kNoExpert;
      if (a == kNoExpert || b == kNoExpert) a = b = kNoExpert;
      memory.narrow_expert[row] = a;
      memory.wide_expert[row] = b;
      differs = differs || (row < count && (a != first_narrow || b != first_wide));
    }
    mixed = __syncthreads_or(differs) != 0;
  }

  // Whether one pair of experts serves all rows.
  ADAMIX_DEVICE bool one() const { return !mixed && first_wide != kNoExpert; }

  // Bit i: row 8 i + fragment_row() of `count` is this expert's.
  template <int Rows>
  ADAMIX_DEVICE uint32_t rows_of_wide(int expert, int count) const {
    uint32_t bits = (uint32_t{1} << (count - fragment_row() + 7) / 8) - 1;
    if (!mixed) return bits;
#pragma unroll
    for (int i = 0; i < Rows / 8; ++i) {
      if (wide[8 * i + fragment_row()] != expert) bits &= ~(1u << i);
    }
    return bits;
  }

  // The smallest expert above `previous`; start with -1. All lanes call.
  ADAMIX_DEVICE int next(const int* experts, int first, int rows, int previous) const {
    if (!mixed) return previous < first ? first : kNoExpert;
    int next = kNoExpert;
#pragma unroll 1
    for (int row = threadIdx.x % 32; row < rows; row += 32) {
      int expert = experts[row];
      if (expert > previous && expert < next) next = expert;
    }
    return warp_reduce(next, Min{});
  }
};

// A tile of Groups * 16 rows, of which a warp holds Chunks * 32 columns; out and narrow rows of a block's own rows.
template <typename T, int Groups, int Chunks>
struct ResidentTile {
  static constexpr int kRows = Groups * kFragmentRows;
  Words rows[Groups][2][Chunks];
  int64_t first;
  int count, col0;  // col0: of the lane's first words

  ADAMIX_DEVICE void place(int64_t total) {
    first = static_cast<int64_t>(blockIdx.x) * kRows;
    count = total - first < kRows ? static_cast<int>(total - first) : kRows;
    col0 = (static_cast<int>(threadIdx.x) / 32 * Chunks) * kFragmentCols + fragment_part() * 8;
  }

  ADAMIX_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < 2 * Groups * Chunks; ++n) rows[n / Chunks / 2][n / Chunks % 2][n % Chunks] = Words{};
  }

  // The tile's rows of a tensor; behind the last row stands that one again.
  ADAMIX_DEVICE void load(const Rows<const T>& from) {
#pragma unroll
    for (int i = 0; i < 2 * Groups; ++i) {
      auto number = static_cast<uint32_t>(static_cast<int>(first) + Min{}(i * 8 + fragment_row(), count - 1));
      uint32_t batch = from.tokens.quotient(number), token = number - batch * from.tokens.by;
      const T* at = from.data + col0 + (batch * from.batch_stride + token * from.token_stride);
#pragma unroll
      for (int c = 0; c < Chunks; ++c) {
        rows[i / 2][i % 2][c] = *reinterpret_cast<const Words*>(at + c * kFragmentCols);
      }
    }
  }

  // memory.sums[warp] = this warp's part of ranks [rank0, rank0 + 16) of tile A^T. Features: A is [ranks, cols].
  template <bool Features, typename Memory>
  ADAMIX_DEVICE void narrow_part(const Memory& memory, const ResidentBank<T>& bank, int rank0) const {
    float sums[Groups][2][4] = {};
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      uint32_t w[4][2];
      int col = col0 + c * kFragmentCols;
      if constexpr (Features) {
        bank.load_rows(w, rank0, col);
      } else {
        bank.load_cols(w, rank0 + fragment_part() * 4, col - fragment_part() * 8);
        transpose_words(w);
      }
#pragma unroll
      for (int m = 0; m < Groups; ++m) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          multiply_rows<T>(sums[m][u], rows[m][0][c], rows[m][1][c], w[0][u], w[1][u], w[2][u], w[3][u]);
        }
      }
    }
    float* to = memory.sums + static_cast<int>(threadIdx.x) / 32 * kRows * kFragmentRanks;
#pragma unroll
    for (int i = 0; i < 2 * Groups; ++i) {
      const auto& of = sums[i / 2];
      int e = i % 2 * 2;
      Piece<float> piece{{of[0][e], of[0][e + 1], of[1][e], of[1][e + 1]}};
      *reinterpret_cast<Piece<float>*>(to + (i * 8 + fragment_row()) * kFragmentRanks + fragment_part() * 4) = piece;
    }
  }

  // Calls finish(row, rank, sums of two ranks) -> word, for the tile's rows; the word goes to memory.narrow.
  template <typename Memory, typename Finish>
  ADAMIX_DEVICE void join_parts(const Memory& memory, int rank0, Finish finish) const {
    int warps = blockDim.x / 32;
    for (int i = threadIdx.x; i < kRows * 8; i += blockDim.x) {
      const float* from = memory.sums + i * 2;
      float low = from[0], high = from[1];
#pragma unroll 4
      for (int warp = 1; warp < warps; ++warp) {
        from += kRows * kFragmentRanks;
        low += from[0], high += from[1];
      }
      int row = i / 8;
      if (row >= count) continue;
      finish(row, rank0 + i % 8 * 2, low, high,
             memory.narrow + rank0 / 16 * kRows * 8 + memory.narrow_place(row, i % 8));
    }
  }

  // out rows = tile + narrow B + bias, of at most Steps * 16 ranks, for the rows of the bits of `keep`. Ranks: B is
  // [cols, ranks].
  template <bool Ranks, int Steps, typename Memory>
  ADAMIX_DEVICE void wide(const Memory& memory, const ResidentBank<T>& bank, const T* bias, T* out,
                          uint32_t keep) const {
    T* to = out + (first + fragment_row()) * bank.cols + col0;
    int64_t eight_rows = static_cast<int64_t>(8 * sizeof(T)) * bank.cols;
    forget(eight_rows);
    const Words* narrow = reinterpret_cast<const Words*>(memory.narrow) + threadIdx.x % 32;
    Words left[Groups];
    if constexpr (Steps == 1) {
#pragma unroll
      for (int m = 0; m < Groups; ++m) left[m] = narrow[32 * m];
    }
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      int col = col0 + c * kFragmentCols;
      uint32_t w[Steps][4][2];
#pragma unroll
      for (int s = 0; s < Steps; ++s) {
        if (s > 0 && s * kFragmentRanks >= bank.ranks) break;
        if constexpr (Ranks) {
          bank.load_cols(w[s], s * kFragmentRanks + fragment_part() * 4, col - fragment_part() * 8);
        } else {
          bank.load_rows(w[s], s * kFragmentRanks, col);
          transpose_words(w[s]);
        }
      }
      Words shift{};
      if (bias != nullptr) shift = *reinterpret_cast<const Words*>(bias + col);
      uint32_t nothing = hidden_zero();
#pragma unroll
      for (int m = 0; m < Groups; ++m) {
        const Words &top = rows[m][0][c], &bottom = rows[m][1][c];
        float sums[4][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float low = low_of<T>(shift.at[k]), high = high_of<T>(shift.at[k]);
          uint32_t upper = top.at[k] | nothing, lower = bottom.at[k] | nothing;
          sums[k][0] = low_of<T>(upper) + low, sums[k][1] = high_of<T>(upper) + high;
          sums[k][2] = low_of<T>(lower) + low, sums[k][3] = high_of<T>(lower) + high;
        }
#pragma unroll
        for (int s = 0; s < Steps; ++s) {
          if (s > 0 && s * kFragmentRanks >= bank.ranks) break;
          if constexpr (Steps > 1) left[m] = narrow[32 * (s * Groups + m)];
          const uint32_t (&a)[4] = left[m].at;
#pragma unroll
          for (int k = 0; k < 4; ++k) multiply<T>(sums[k], a[0], a[1], a[2], a[3], w[s][k][0], w[s][k][1]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int e = 2 * half;
          uint4 piece{word_of<T>(sums[0][e], sums[0][e + 1]), word_of<T>(sums[1][e], sums[1][e + 1]),
                      word_of<T>(sums[2][e], sums[2][e + 1]), word_of<T>(sums[3][e], sums[3][e + 1])};
          int row = 2 * m + half;
          store_piece_if(keep >> row & 1, to + c * kFragmentCols, row * eight_rows, piece);
        }
      }
    }
  }

  // NaN in columns [0, cols) of out's rows that no expert serves.
  ADAMIX_DEVICE void poison(const ResidentExperts& experts, T* out, int cols) const {
    if (!experts.mixed && experts.first_narrow != kNoExpert) return;
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < count; row += blockDim.x / 32) {
      if (experts.narrow[row] != kNoExpert) continue;
#pragma unroll 1
      for (int col = threadIdx.x % 32; col < cols; col += 32) {
        out[(first + row) * cols + col] = from_float<T>(not_a_number());
      }
    }
  }
};

}  // namespace adamix
