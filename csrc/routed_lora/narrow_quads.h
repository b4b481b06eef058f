// Operands of routed LoRA's products as the instruction takes them: four words of rows g and g + 8, one after another.
#pragma once

#include "routed_lora/lora_team.h"

namespace adamix {

// As the others: the same value, which the compiler takes for another one.
ADAMIX_DEVICE void forget(uint32_t& value) {
#if ADAMIX_ARCH > 0
  asm volatile("" : "+r"(value));
#else
  (void)value;
#endif
}

// 0 for a number of rows, which the assembler cannot know.
ADAMIX_DEVICE uint32_t unseen_zero(int64_t rows) { return static_cast<uint32_t>(rows >> 63); }

// A step's pieces of 16 rows. The assembler copies words that were loaded into place ahead of every product; those that
// were computed, if only by an OR with zero, are put there once.
struct OperandRows {
  uint4 first, second;

  OperandRows() = default;
  ADAMIX_DEVICE OperandRows(const uint4& upper, const uint4& lower, uint32_t zero)
      : first{upper.x | zero, lower.x | zero, upper.y | zero, lower.y | zero},
        second{upper.z | zero, lower.z | zero, upper.w | zero, lower.w | zero} {}

  // sums += the rows times 8 columns over the step.
  template <typename T>
  ADAMIX_DEVICE void multiply_step(float (&sums)[4], const uint4& cols) const {
    multiply<T>(sums, first.x, first.y, first.z, first.w, cols.x, cols.y);
    multiply<T>(sums, second.x, second.y, second.z, second.w, cols.z, cols.w);
  }
};

// The narrow results of a team's rows. Of 16 rows and 16 inner columns, lane 4 g + q finds those from 4 q on of rows g
// and g + 8 in one piece: upper.x, lower.x, upper.y, lower.y. A group's columns begin at a multiple of 16.
template <typename T>
struct NarrowQuads {
  static constexpr int kPitch = 32 * 8 + 32;  // numbers of a tile; 64 bytes more, as a warp writes to several at a time

  T* data;  // [2, tiles, kPitch]
  int group_tiles, tiles;

  template <typename Memory>
  ADAMIX_BOTH NarrowQuads(Memory& memory, int groups, int rank, int teams, int team)
      : group_tiles(ceil_div(rank, 16)), tiles(groups * group_tiles) {
    data = memory.template take<T>(teams * 2 * tiles * kPitch) + team * 2 * tiles * kPitch;
  }
  // Zeros, where not every number is stored. All threads call; complete after a barrier.
  ADAMIX_DEVICE void clear(const LaneRows& at, int rank) const {
    if (rank % 16 == 0 && at.count == kTeamRows) return;
    for (int i = at.thread(); i < 2 * tiles * kPitch / 8; i += kTeamThreads)
      store_words(data + 8 * i, uint4{0, 0, 0, 0});
  }
  // Columns `col`, an even number, and the next one of a group.
  ADAMIX_DEVICE void store(uint32_t row, uint32_t group, uint32_t col, uint32_t words) const {
    uint32_t tile = row / 16 * tiles + group * group_tiles + col / 16;
    uint32_t piece = row % 8 * 4 + col % 16 / 4, word = col % 4 / 2 * 2 + row / 8 % 2;
    store_words(data + tile * kPitch + 8 * piece + 2 * word, words);
  }
  // Of 16 rows from 16 `half` on, a group's inner columns from 16 k on.
  ADAMIX_DEVICE uint4 load(const LaneRows& at, int half, int group, int k) const {
    return load_words<uint4>(data + (half * tiles + group * group_tiles + k) * kPitch + 8 * at.lane);
  }
};

}  // namespace adamix
