// out = sum over m of softmax(scores)[m] * bank[m], and W + scaling * mean(B_g) mean(A_g).
#pragma once

#include "common/dtype.h"
#include "common/launch.h"
#include "common/scalar.h"

namespace adamix {

// As many banks as fit into the 4 KB of parameters that every architecture has.
constexpr int kMergeBanks = 112;

// Column n is a bank: its block b computes elements (b - first_block[n]) * chunk : + chunk of its result.
template <typename T>
struct MergeBanks {
  const T* bank[kMergeBanks];       // [M, size]
  T* out[kMergeBanks];              // [size]
  const void* scores[kMergeBanks];  // [M]
  int size[kMergeBanks];            // elements of one expert, above 0
  int first_block[kMergeBanks];
  unsigned short experts[kMergeBanks];  // M
  Kind scored[kMergeBanks];             // kNone: the uniform mean
  bool aligned[kMergeBanks];            // bank, each of its experts and out start at multiples of 16 bytes
  int banks;
  int most_experts;
};
static_assert(sizeof(MergeBanks<float>) <= 4096, "the parameters of a launch");

template <typename T>
struct MergeGrad {
  const T* grad;       // [size]
  const T* bank;       // [M, size]
  const void* scores;  // [M], none: the uniform mean
  T* bank_grad;        // [M, size] or null
  void* plane;         // [M, blocks], float or double: each block's part of sum(bank[m] * grad); or null
  int size, experts;
  Kind scored;
  bool aligned;
};

struct MergeScoresGrad {
  const void* plane;   // [M, blocks]
  const void* scores;  // [M]
  void* scores_grad;   // [M]
  int blocks, experts;
  Kind scored;  // of scores and scores_grad
};

constexpr int kMergeGroups = 64;
constexpr int kLoraRows = 64, kLoraCols = 128;  // a block's tile of the weight

// Layers of one launch: their places are the launch's parameters.
constexpr int kMergeLayers = 96;

// mean over the experts of A [experts, groups * r, K], or of B [experts, groups * Ng, r], of each layer.
struct LoraFactor {
  const void* data[kMergeLayers];
  int experts;
  int64_t stride;  // elements of an expert
  bool by_four;    // data are multiples of 16 bytes, their rows are multiples of 4 elements
};

// Layers that are alike in all but where they lie; blockIdx.y is the layer.
template <typename T>
struct MergeLora {
  const T* weight[kMergeLayers];  // [height, width]: [N, K], or [K, N] with fan_in_fan_out
  T* out[kMergeLayers];           // the same; it may be weight
  LoraFactor a, b;
  double scaling;
  int height, width, features, rank, per_group;  // K, r, Ng
  int first_group, here;                         // of this launch: the first one, and how many
  Kind kind;                                     // of both factors
  bool fan_in_fan_out;
  bool aligned;               // rows of every weight and out start at multiples of 16 bytes
  int layers;                 // of this launch
  int offsets[kMergeGroups];  // of this launch's groups

  ADAMIX_BOTH dim3 blocks() const {
    unsigned rows = (height + kLoraRows - 1) / kLoraRows, cols = (width + kLoraCols - 1) / kLoraCols;
    return dim3(rows * cols, static_cast<unsigned>(layers));
  }
  // Whether a group has outputs in the tile at row0, col0.
  ADAMIX_DEVICE bool touches(int group, int row0, int col0) const {
    int begin = fan_in_fan_out ? col0 : row0, end = begin + (fan_in_fan_out ? kLoraCols : kLoraRows);
    return offsets[group] < end && offsets[group] + per_group > begin;
  }
};

// A of each layer: single factors, or banks whose means in the banks' dtype stand for them.
struct LoraBank {
  const void* data[kMergeLayers];    // [experts, rows, columns]
  const void* scores[kMergeLayers];  // [experts] of `scored`
  void* mean;                        // [layers, rows, columns]: where the means go; of single factors null
  int64_t stride;                    // elements of an expert
  int experts;
  Kind scored;  // kNone: the uniform mean
};

// Layers that are alike in all but where they lie; blockIdx.y is the layer. A block merges `tall` tiles side by side
// along the outputs, so that it makes the mean of the inputs' part of A once.
template <typename T>
struct MergeLoraProduct {
  const T* weight[kMergeLayers];  // [height, width]
  T* out;                         // [layers, height, width]; a weight may be its part of it
  LoraBank a;                     // [Ma, groups * r, K]
  const void* b[kMergeLayers];    // [groups * Ng, r]
  float scaling;
  int height, width, features, rank, per_group;  // K, r, Ng
  int first_group, here;                         // of this launch: the first one, and how many
  int layers, tall;
  int offsets[kMergeGroups];  // of this launch's groups

  // Tiles along the outputs, and across them.
  ADAMIX_BOTH int along(bool fan_in_fan_out) const {
    return fan_in_fan_out ? (width + kLoraCols - 1) / kLoraCols : (height + kLoraRows - 1) / kLoraRows;
  }
  ADAMIX_BOTH int across(bool fan_in_fan_out) const {
    return fan_in_fan_out ? (height + kLoraRows - 1) / kLoraRows : (width + kLoraCols - 1) / kLoraCols;
  }
  ADAMIX_BOTH dim3 blocks(bool fan_in_fan_out) const {
    int together = (along(fan_in_fan_out) + tall - 1) / tall * across(fan_in_fan_out);
    return dim3(static_cast<unsigned>(together), static_cast<unsigned>(layers));
  }
};
static_assert(sizeof(MergeLoraProduct<half>) <= 4096, "the parameters of a launch");

#if defined(ADAMIX_LAUNCHERS)
// Elements of a result that a block computes at a time, and the most blocks that share the gradient's sums.
template <typename T>
constexpr int kMergeChunk = 256 * Piece<T>::kSize;
constexpr int kMergeGradBlocks = 1024;

// wide: scores, sums and plane are double.
template <typename T>
void launch_merge_banks(const MergeBanks<T>& params, int blocks, bool wide, const Device& device);
template <typename T>
void launch_merge_grad(const MergeGrad<T>& params, int blocks, bool wide, const Device& device);
void launch_merge_scores_grad(const MergeScoresGrad& params, bool wide, const Device& device);
template <typename T>
void launch_merge_lora(const MergeLora<T>& params, bool wide, const Device& device);
// Bytes of a block's shared memory there: all ranks of the part of A that its tiles share.
size_t merge_lora_product_bytes(int rank, int experts, bool fan_in_fan_out, bool split);
// Factors, A's possibly the means of banks, into a 16-bit weight, all of it aligned, on matrix units. split: those of
// float32, each number as two of bfloat16; else of the weight's own dtype.
template <typename T>
void launch_merge_lora_product(const MergeLoraProduct<T>& params, bool fan_in_fan_out, bool split,
                               const Device& device);
#endif

}  // namespace adamix
