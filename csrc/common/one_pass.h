// A routed op's whole backward in one pass over x and grad_out, for at most 16 ranks and one expert a side in every
// sample. The down side is the adapter's first weight, or LoRA's A; the up side the second one, or B.
//
// A block walks tiles of 16 rows, each of one sample. Its warps have 64 columns each, of the tile and of both weight
// gradients, whose sums stay in registers until the expert changes; a second launch adds up what the blocks leave.
#pragma once

#include "common/activated.h"
#include "common/divisor.h"
#include "common/dropout.h"
#include "common/fragment_shape.h"
#include "common/launch.h"
#include "common/rows.h"
#include "common/shared_memory.h"
#include "common/tile_sizes.h"

namespace adamix {

constexpr int kPassCols = 64;      // of a warp
constexpr int kPassThreads = 512;  // at most, of a block
constexpr int kPassSumThreads = 256;
constexpr int kPassSumParts = 4;  // of the planes, summed side by side

// The adapter has biases, an activation and the input's own gradient to add; LoRA a scaling and a dropout.
template <typename T>
struct OnePass {
  Rows<const T> grad_out, x;  // [B, S, H]
  const T* narrow;            // [N, r]: values before the activation, or dropout(x) A^T
  const T* down_weight;       // [Md, r, H]
  const T* up_weight;         // [Mu, H, r]
  T* dx;                      // [N, H] or null
  Routing down, up;
  int64_t planes_size;  // of one expert's sums in a plane: [r, H], then the bias
  float* planes;        // [blocks, side, slots, planes_size]
  int* experts;         // [blocks, side, slots]: whose sums a plane holds; kNoExpert: nobody's
  int slots;
  int tokens, tiles, tiles_a_block;
  Divisor tiles_a_sample;
  int hidden, rank;
  Dropout dropout;
  float scaling;
  Activation activation;
  bool add_input, need_down, need_up;
};

template <typename T>
struct PassSum {
  const float* planes;
  const int* experts;
  int64_t planes_size;
  int blocks, slots;  // of the first launch
  int hidden, rank;
  int down_jobs, chunks;                             // experts of the down side, and blocks for each
  T *down_weight, *down_bias, *up_weight, *up_bias;  // no bias: null
  float down_scale, up_scale;                        // of the sums
};

// A warp's two stages of 16 rows of 64 columns of both tensors; a block's sums and narrow tiles.
template <typename T>
struct PassMemory {
  static constexpr int kTile = kFragmentRows * kPassCols;
  // What has a size that is known comes first, what is of whole warps next: places that need no sums.
  T* narrow;       // [2, 16, 16]: the gradient of the narrow values, and what they become
  float* bias;     // [16, 16]
  TwoWords* keys;  // [16]: of the rows' dropout
  int* held;       // [side, 2]: the expert of the sums held at the end, and its slot
  T* stages;       // [warps, 2, tensor, kTile]
  float* sums;     // [warps, 16, 16]
  Words* weights;  // [warps, side, 4, lanes]: right operands, where the weights are kept
  int* slots;      // [side, slots]
  int* experts;    // [tiles, side]

  template <typename Memory>
  ADAMIX_BOTH PassMemory(Memory& memory, int warps, int slot_count, int tiles, bool keeps)
      : narrow(memory.template take<T>(2 * kFragmentRows * kFragmentRanks)),
        bias(memory.template take<float>(kFragmentRows * kFragmentRanks)),
        keys(memory.template take<TwoWords>(kFragmentRows)),
        held(memory.template take<int>(4)),
        stages(memory.template take<T>(warps * 4 * kTile)),
        sums(memory.template take<float>(warps * kFragmentRows * kFragmentRanks)),
        weights(memory.template take<Words>(keeps ? warps * 2 * 4 * 32 : 0)),
        slots(memory.template take<int>(2 * slot_count)),
        experts(memory.template take<int>(2 * tiles)) {}
};

}  // namespace adamix
