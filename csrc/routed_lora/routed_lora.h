// out[:, o_g : o_g + Ng] = base + scaling * (dropout(x) A[i]_g^T) B[j]_g^T for every group g of columns, every row
// through its own experts i and j.
#pragma once

#include "common/column_ranges.h"
#include "common/dropout.h"
#include "common/grad_side.h"
#include "common/launch.h"
#include "common/rows.h"

namespace adamix {

template <typename T>
struct RoutedLoraForward {
  Rows<const T> x;     // [B, S, K]
  Rows<const T> base;  // [B, S, N]; data null: zeros
  const T* lora_a;     // [Ma, groups * r, K]
  const T* lora_b;     // [Mb, groups * Ng, r]
  T* out;              // [N, width]; may be base's own memory, and the gaps are then none
  T* t;                // [N, groups * r], dropout(x) A^T
  Routing a, b;
  ColumnRanges ranges;
  Dropout dropout;
  int64_t rows;  // N = B * S
  int features, rank, width;
  float scaling;
  bool a_aligned, b_aligned, out_aligned;  // rows start at multiples of 16 bytes
};

template <typename T>
struct RoutedLoraInputGrad {
  Rows<const T> grad_out;  // [B, S, N]
  const T* lora_a;
  const T* lora_b;
  T* dt;  // [N, groups * r], scaling * grad_out B, or null
  T* dx;  // [N, K], dropout'(dt A), or null
  Routing a, b;
  ColumnRanges ranges;
  Dropout dropout;
  int64_t rows;
  int features, rank;
  float scaling;
  bool a_aligned, b_aligned, dx_aligned;
};

template <typename T>
struct RoutedLoraWeightGrad {
  GradSide<T> a;  // dA = dt^T dropout(x)
  GradSide<T> b;  // dB = scaling * grad_out^T t
  ColumnRanges ranges;
  Dropout dropout;
  RowShares shares;
  float scaling;
  int tiles;  // of 16 ranks of a group, 1 to 4, where rows are 16-byte pieces; 0: they are not
};

// Columns that a block has where rows are 16-byte pieces, and one side's blocks for a share of the rows.
ADAMIX_BOTH constexpr int lora_grad_cols(int tiles) { return tiles == 1 ? 64 : 32; }
template <typename T>
ADAMIX_BOTH int lora_grad_jobs(const GradSide<T>& side, int tiles) {
  return side.experts == 0 ? 0 : side.groups * ceil_div(side.cols, lora_grad_cols(tiles));
}

#if defined(ADAMIX_LAUNCHERS)
// Launches nothing and returns false where rows are no 16-byte pieces, or the GPU has no such products in registers.
template <typename T>
bool launch_routed_lora_forward_mma(const RoutedLoraForward<T>& params, const Device& device);

template <typename T>
void launch_routed_lora_forward(const RoutedLoraForward<T>& params, const Device& device);

template <typename T>
bool launch_routed_lora_input_grad_mma(const RoutedLoraInputGrad<T>& params, const Device& device);

template <typename T>
void launch_routed_lora_input_grad(const RoutedLoraInputGrad<T>& params, const Device& device);

template <typename T>
void launch_routed_lora_weight_grad_mma(const RoutedLoraWeightGrad<T>& params, const Device& device);

template <typename T>
void launch_routed_lora_weight_grad(const RoutedLoraWeightGrad<T>& params, const Device& device);
#endif

}  // namespace adamix
