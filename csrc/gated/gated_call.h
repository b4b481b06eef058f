// A call of an op with gates, checked: what LoRA and the adapter have in common, forward and backward.
#pragma once

#include <algorithm>

#include "common/checks.h"
#include "gated/gated.h"

namespace adamix {

// Which of the banks, biases and rows are needed, as tensors that live until the launch.
struct GatedCall {
  DType dtype;
  int64_t batch, tokens, rows, features, ranks, rank;
  int64_t down_experts, up_experts;
  int width;  // columns of base, or of the gradient
  bool has_ids;
  bool one_index = false;  // of both sides, as far as that can be seen without its values
  ColumnRanges ranges{};
  Gates gates{};
  Dropout dropout{nullptr, 0, 1.f};
  Activation activation = Activation::kNone;
  Tensor x, down, up;
  OptionalTensor down_bias, up_bias;
  ScalarType gates_dtype;
  std::vector<Tensor> kept;

  // x [B, S, K], down [Md, groups * r, K], up [Mu, groups * Ng, r]; names: as messages call x, the banks and indices.
  struct Names {
    const char *down, *down_layout, *up, *up_layout, *down_index, *up_index;
  };
  GatedCall(const Tensor& x, const Tensor& down, const Tensor& up, int64_t groups, const Names& names);
  // gates [B, slots] or [B, S, slots]; indices of their shape or none; scales [M] or none; mix "outputs" or "weights".
  void check_gates(const Tensor& gates, const OptionalTensor& down_index, const OptionalTensor& up_index,
                   const OptionalTensor& scales, double scaling, const std::string& mix, const Names& names);
  // rows [B, S, N] of x's dtype.
  void check_rows(const char* name, const Tensor& rows) const;

  int64_t down_slots() const { return gates.down.slots; }
  void make_banks_contiguous();
};

// What forward and backward both know; the banks are contiguous.
template <typename T>
void fill(GatedBanks<T>& banks, const GatedCall& call) {
  banks.down = data<const T>(call.down);
  banks.up = data<const T>(call.up);
  banks.down_bias = data<const T>(call.down_bias);
  banks.up_bias = data<const T>(call.up_bias);
  banks.gates = call.gates;
  banks.ranges = call.ranges;
  banks.dropout = call.dropout;
  banks.activation = call.activation;
  banks.rows = call.rows;
  banks.features = static_cast<int>(call.features);
  banks.rank = static_cast<int>(call.rank);
  banks.by_rank = divisor(std::max(1, banks.rank));
  banks.by_ranks = divisor(std::max(1, static_cast<int>(call.ranks)));
  banks.down_aligned = is_aligned(banks.down, {call.features}, sizeof(T));
  banks.up_aligned = is_aligned(banks.up, {call.rank}, sizeof(T));
}

// A checked call of LoRA with gates. rows_like: base or the gradient, named rows_name; none: as many columns as the
// groups reach.
GatedCall gated_lora_call(const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& a_index,
                          const OptionalTensor& b_index, const Tensor& gates, const OptionalTensor& scales,
                          const char* rows_name, const OptionalTensor& rows_like, const OptionalTensor& seed,
                          double scaling, int64_t groups, const std::vector<int64_t>& offsets, double dropout_p,
                          const std::string& mix);

// What a forward reads and writes: rows that are contiguous, banks too; base [B, S, N] or none, out as that, and t.
struct GatedRows {
  OptionalTensor base;
  Tensor out, t;

  // Allocates t; out may be base itself.
  GatedRows(GatedCall& call, const OptionalTensor& base, const Tensor& out);
};
template <typename T>
void fill(GatedForward<T>& params, const GatedCall& call, const GatedRows& rows) {
  fill<T>(static_cast<GatedBanks<T>&>(params), call);
  params.x = rows_of<const T>(call.x);
  params.base = rows_of<const T>(rows.base);
  params.out = data<T>(rows.out);
  params.t = data<T>(rows.t);
  params.width = call.width;
  params.out_aligned = is_aligned(params.out, {call.width}, sizeof(T));
}
void run_gated_forward(GatedCall& call, const Device& device, const GatedRows& rows);

struct GatedNeeds {
  bool x, down, up, gates, add_input;
};
struct GatedGrads {
  Tensor x, down, down_bias, up, up_bias, gates;
};
// Where pairs of a row and a slot are sorted by expert: launches nothing and returns false where that does not serve.
template <typename T>
bool sorted_forward(const GatedForward<T>& whole, GatedCall& call, const Device& device);
template <typename T>
bool sorted_backward(const GatedInputGrad<T>& whole, GatedCall& call, const Device& device, const GatedNeeds& needs,
                     bool biases, GatedGrads& grads);
// Biases' gradients are for banks that have biases; of gates of samples, one a row: [B, S, slots] in float32.
GatedGrads run_gated_backward(GatedCall& call, const Device& device, Tensor grad_out, Tensor t, const GatedNeeds& needs,
                              bool biases);

}  // namespace adamix
