// out = base + sum over a row's slots k of g_k (act(dropout(x) A[a_k]^T + bias_a) s_k B[b_k]^T + bias_b), or with the
// experts' weights averaged first: LoRA with groups of columns and an adapter with biases are two cases of it.
#pragma once

#include "common/activation.h"
#include "common/column_ranges.h"
#include "common/dropout.h"
#include "common/grad_side.h"
#include "common/launch.h"
#include "gated/gates.h"

namespace adamix {

constexpr int kChunkRanks = 64;     // narrow columns that rows of 16-byte pieces are multiplied by at a time
constexpr int kGatedGradCols = 32;  // columns of a block of gated_grads_mma.cu

// What forward and backward have in common.
template <typename T>
struct GatedBanks {
  const T* down;       // A [Md, groups * r, K]
  const T* up;         // B [Mu, groups * Ng, r]
  const T* down_bias;  // [Md, groups * r] or null
  const T* up_bias;    // [Mu, Ng] or null: of one group
  Gates gates;
  ColumnRanges ranges;
  Dropout dropout;
  Activation activation;
  int64_t rows;  // N = B * S
  int features, rank;
  Divisor by_rank, by_ranks;      // r and groups * r, or 1
  bool down_aligned, up_aligned;  // rows start at multiples of 16 bytes

  ADAMIX_BOTH int ranks() const { return ranges.groups * rank; }
};

template <typename T>
struct GatedForward : GatedBanks<T> {
  Rows<const T> x;     // [B, S, K]
  Rows<const T> base;  // [B, S, N]; data null: zeros
  T* out;              // [N, width]; may be base's own memory, and the gaps are then none
  T* t;                // [N, down.slots, groups * r], before the activation
  T* mixed;            // [N, up.slots, groups * r]: what each slot's B is multiplied by
  T* bias_gates;       // [N, up.slots]: and each slot's bias; null where there is none
  int width;
  bool out_aligned;
};

template <typename T>
struct GatedInputGrad : GatedBanks<T> {
  Rows<const T> grad_out;  // [B, S, N]
  const T* t;
  T* u;             // [N, up.slots, groups * r], grad_out B
  T* dt;            // [N, down.slots, groups * r], the gradient of t
  T* mixed;         // as in the forward, or null
  T* bias_gates;    // the same, or null
  int* down_ids;    // [N, down.slots] of the slots' experts, -1 in a row of a wrong id; null where none differ
  int* up_ids;      // the same
  int mixed_pitch;  // of 16-byte pieces, where dt and mixed are of all experts instead: [N, Md, groups * r] and
                    // [N, groups, Mu, r], what no slot names 0, with the biases' gates behind it
  void* dgates;     // [N, slots], or null
  Kind dgates_kind;
  T* dx;         // [N, K], or null
  bool gathers;  // in 16-byte pieces: whether grad_out B is wanted
  bool add_input, dx_aligned;
};

// Of narrow_e^T wide, over the pairs of a row and a slot where slots name experts of their own.
template <typename T>
struct GatedWeightGrad {
  GradSide<T> side[3];  // dA and its bias, dB, the bias of up
  int pairs[3];         // of a row
  ColumnRanges ranges;
  Dropout dropout;
  RowShares shares;  // of rows
};

// The same of rows of 16-byte pieces, where what is narrow is of all experts.
template <typename T>
struct GatedTeamGrad {
  Rows<const T> x, grad_out;
  const T* dt;     // [N, Md * groups * r], or null
  const T* mixed;  // [N, mixed_pitch], or null
  Grad<T> down, down_bias, up, up_bias;
  Gates gates;
  ColumnRanges ranges;
  Dropout dropout;
  RowShares shares;
  bool large;  // blocks of twice the warps
  int features, rank, mixed_pitch;
  Divisor by_rank, by_ranks;

  ADAMIX_BOTH int down_ranks() const { return gates.down.experts * ranges.groups * rank; }
  // Of a group, with the biases.
  ADAMIX_BOTH int up_ranks() const { return gates.up.experts * rank + (up_bias.out == nullptr ? 0 : gates.up.experts); }
  ADAMIX_BOTH int down_jobs() const {
    return dt == nullptr ? 0 : ceil_div(down_ranks(), kChunkRanks) * ceil_div(features, kGatedGradCols);
  }
  ADAMIX_BOTH int up_jobs() const {
    int chunks = ceil_div(up_ranks(), kChunkRanks) * ceil_div(ranges.cols, kGatedGradCols);
    return mixed == nullptr ? 0 : ranges.groups * chunks;
  }
};

#if defined(ADAMIX_LAUNCHERS)
// Launches nothing and returns false where rows are no 16-byte pieces, or the GPU has no such products in registers.
template <typename T>
bool launch_gated_forward_mma(const GatedForward<T>& params, const Device& device);

template <typename T>
void launch_gated_forward(const GatedForward<T>& params, const Device& device);

// Whether rows are 16-byte pieces here. biased: biases up, or their gradients, are wanted.
template <typename T>
bool gated_team_takes(const GatedInputGrad<T>& params, bool biased, const Device& device);

template <typename T>
void launch_gated_input_grad_mma(const GatedInputGrad<T>& params, const Device& device);

// Shared memory of a block of the next launch, where it is large.
size_t gated_large_block_bytes();

template <typename T>
void launch_gated_weight_grad_mma(const GatedTeamGrad<T>& params, const Device& device);

template <typename T>
void launch_gated_input_grad(const GatedInputGrad<T>& params, const Device& device);

template <typename T>
void launch_gated_weight_grad(const GatedWeightGrad<T>& params, const Device& device);
#endif

}  // namespace adamix
