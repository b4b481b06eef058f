// A routed op's weight gradients where every sample has one expert a side, of ranks that one_pass.h does not hold, or
// of rows that are too wide for it. Each side is one product, of its wide operand and its narrow one.
//
// A block has kSampleCols columns of one side and a share of the tiles, which lie in the order of the side's experts:
// tiles of 64 rows of one sample. Four warps have 16 rows each of 64 columns, the other four of the next 64 columns.
// Their sums stay in registers until the expert changes; a second launch adds up what the shares leave.
#pragma once

#include "common/dropout.h"
#include "common/grad_side.h"
#include "common/launch.h"
#include "common/one_pass.h"

namespace adamix {

constexpr int kSampleThreads = 256;
constexpr int kSampleCols = 2 * kPassCols;
constexpr int kSampleRows = 4 * kFragmentRows;  // of a tile
constexpr int kSampleStages = 3;
constexpr int kSamplesSorted = 1024;  // at most

template <typename T>
struct SampleGrads {
  GradSide<T> down, up;
  Dropout dropout;  // of down.wide
  float* planes;    // [shares, side, slots, planes_size]: an expert's [rank, cols], then its bias
  int* experts;     // [shares, side, slots]: whose sums a plane holds; kNoExpert: nobody's
  int64_t planes_size;
  int slots, samples, tokens, tiles_a_sample;
  int cols, ranks;  // of either side
  int down_jobs;    // blocks of a share for the down side
};

// A stage has four groups of 16 rows, each of two warps' columns and of the ranks.
template <typename T, int Steps>
struct SampleMemory {
  static constexpr int kWide = kFragmentRows * kPassCols, kNarrow = kFragmentRows * kFragmentRanks;
  static constexpr int kGroup = 2 * kWide + Steps * kNarrow;
  static constexpr int kStage = 4 * kGroup;
  static constexpr int kPitch = kSampleCols + 8;  // 8 ranks of 4 pairs of columns: no bank twice
  T* stages;                                      // [kSampleStages, kStage]
  float* sums;                                    // [16 * Steps, kPitch]
  float* bias;                                    // [kSampleCols], or of ranks
  int* served;                                    // samples that an expert serves
  int* expert_of;                                 // [samples]
  int* order;                                     // [samples]: those served

  template <typename Memory>
  ADAMIX_BOTH SampleMemory(Memory& memory, int samples)
      : stages(memory.template take<T>(kSampleStages * kStage)),
        sums(memory.template take<float>(16 * Steps * kPitch)),
        bias(memory.template take<float>(kSampleCols)),
        served(memory.template take<int>(1)),
        expert_of(memory.template take<int>(samples)),
        order(memory.template take<int>(samples)) {}
};

}  // namespace adamix
