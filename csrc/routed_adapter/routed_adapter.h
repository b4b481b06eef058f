// out = residual + act(x Wd[i]^T + bd[i]) Wu[j]^T + bu[j], every row through its own experts i and j.
#pragma once

#include "common/activation.h"
#include "common/grad_side.h"
#include "common/launch.h"
#include "common/one_pass_plan.h"
#include "common/rows.h"

namespace adamix {

template <typename T>
struct RoutedAdapterForward {
  Rows<const T> x;         // [B, S, H]
  Rows<const T> residual;  // [B, S, Hout]; data null: none
  const T* down_weight;    // [Md, r, H]
  const T* down_bias;      // [Md, r] or null
  const T* up_weight;      // [Mu, Hout, r]
  const T* up_bias;        // [Mu, Hout] or null
  T* out;                  // [N, Hout]
  T* pre;                  // [N, r], x Wd^T + bd
  Routing down, up;
  int64_t rows;  // N = B * S
  int hidden, rank, out_features;
  Activation activation;
  bool down_aligned, up_aligned, out_aligned;  // rows of the weights, and of out, start at multiples of 16 bytes
};

template <typename T>
struct RoutedAdapterInputGrad {
  Rows<const T> grad_out;  // [B, S, Hout]
  const T* pre;            // [N, r]
  const T* down_weight;    // [Md, r, H]
  const T* up_weight;      // [Mu, Hout, r]
  T* dpre;                 // [N, r], (grad_out Wu) act'(pre), or null
  T* h;                    // [N, r], act(pre), or null
  T* dx;                   // [N, H], dpre Wd (+ grad_out), or null
  Routing down, up;
  int64_t rows;
  int hidden, rank, out_features;
  Activation activation;
  bool add_input;
  bool down_aligned, up_aligned, dx_aligned;
};

template <typename T>
struct RoutedAdapterWeightGrad {
  GradSide<T> down;  // dWd = dpre^T x, dbd: the sum of dpre
  GradSide<T> up;    // dWu = grad_out^T h, dbu: the sum of grad_out
  RowShares shares;
};

#if defined(ADAMIX_LAUNCHERS)
template <typename T>
void launch_routed_adapter_forward(const RoutedAdapterForward<T>& params, const Device& device);

template <typename T>
void launch_routed_adapter_input_grad(const RoutedAdapterInputGrad<T>& params, const Device& device);

template <typename T>
void launch_routed_adapter_weight_grad(const RoutedAdapterWeightGrad<T>& params, const Device& device);

// half and bfloat16 alone.
template <typename T>
void launch_routed_adapter_one_pass(const OnePass<T>& params, const PassPlan& plan, const Device& device);

// down_experts, up_experts: 0 where that side is not wanted.
template <typename T>
void launch_routed_adapter_pass_sum(const PassSum<T>& params, int down_experts, int up_experts, const Device& device);
#endif

}  // namespace adamix
