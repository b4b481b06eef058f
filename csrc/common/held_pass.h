// The backward in one pass (one_pass.h) on GPUs without the products of common/fragments.h (V100), in half.
//
// Tiles, columns of warps and planes are those of one_pass.h. The matrix units take their operands from shared memory,
// where a tile of x comes in the place of grad_out's; without asynchronous copies, rows are under way in registers.
#pragma once

#include "common/one_pass.h"

namespace adamix {

// A warp's tiles of 16 rows of 64 columns, and the block's narrow tiles.
template <typename T>
struct HeldPassMemory {
  static constexpr int kPitch = kPassCols + 8, kTile = kFragmentRows * kPitch;
  // Of a warp's sums, and of its right operand in their place, of which 16 columns are used: against bank conflicts.
  static constexpr int kSumsPitch = 20, kRightPitch = 24, kSums = 16 * kSumsPitch;
  static constexpr int kNarrow = kFragmentRows * kRightPitch;
  T* narrow;       // [2, 16, kRightPitch]: the gradient of the narrow values, and what they become
  TwoWords* keys;  // [16]: of the rows' dropout
  T* stages;       // [warps, kTile]
  T* weights;      // [warps, kTile]: an expert's Wd, 16 ranks
  float* sums;     // [warps, kSums]
  int* slots;      // [side, slots]

  template <typename Memory>
  ADAMIX_BOTH HeldPassMemory(Memory& memory, int warps, int slot_count)
      : narrow(memory.template take<T>(2 * kNarrow)),
        keys(memory.template take<TwoWords>(kFragmentRows)),
        stages(memory.template take<T>(warps * kTile)),
        weights(memory.template take<T>(warps * kTile)),
        sums(memory.template take<float>(warps * kSums)),
        slots(memory.template take<int>(2 * slot_count)) {}
};

#if defined(ADAMIX_LAUNCHERS)
struct PassPlan;

// half alone.
template <bool Lora, typename T>
void launch_held_pass(const OnePass<T>& params, const PassPlan& plan, const Device& device);
#endif

}  // namespace adamix
