// The entries of gated LoRA and of the gated adapter from the dispatcher.
#include <algorithm>

#include "common/adapter_checks.h"
#include "common/lora_checks.h"
#include "gated/gated_call.h"
#include "registration.h"

namespace adamix {
namespace {

constexpr GatedCall::Names kLora{"lora_a", "[Ma, groups * r, K]", "lora_b", "[Mb, groups * Ng, r]", "a_index",
                                 "b_index"};
constexpr GatedCall::Names kAdapter{"down_weight",   "[Md, r, H]", "up_weight",
                                    "[Mu, Hout, r]", "down_index", "up_index"};

GatedCall adapter_call(const Tensor& x, const Tensor& down_weight, const OptionalTensor& down_bias,
                       const Tensor& up_weight, const OptionalTensor& up_bias, const OptionalTensor& down_index,
                       const OptionalTensor& up_index, const Tensor& gates, bool add_input,
                       const std::string& activation, const std::string& mix) {
  GatedCall call(x, down_weight, up_weight, 1, kAdapter);
  check_bias("down_bias", down_bias, "[Md, r]", call.down_experts, call.rank, x);
  check_bias("up_bias", up_bias, "[Mu, Hout]", call.up_experts, call.width, x);
  call.down_bias = down_bias, call.up_bias = up_bias;
  if (add_input) check_sizes("x as the residual", x, "[B, S, Hout]", {call.batch, call.tokens, call.width});
  call.activation = activation_of(activation);
  call.check_gates(gates, down_index, up_index, std::nullopt, 1.0, mix, kAdapter);
  return call;
}

}  // namespace

GatedCall gated_lora_call(const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& a_index,
                          const OptionalTensor& b_index, const Tensor& gates, const OptionalTensor& scales,
                          const char* rows_name, const OptionalTensor& rows_like, const OptionalTensor& seed,
                          double scaling, int64_t groups, const std::vector<int64_t>& offsets, double dropout_p,
                          const std::string& mix) {
  GatedCall call(x, lora_a, lora_b, groups, kLora);
  if (rows_like.has_value()) {
    check_sizes(rows_name, *rows_like, "[B, S, N]", {-1, -1, -1});
    call.width = check_int("N", rows_like->size(2));
    call.check_rows(rows_name, *rows_like);
  }
  call.ranges = check_ranges(offsets, groups, call.ranges.cols, rows_like.has_value() ? call.width : -1);
  if (!rows_like.has_value()) {
    call.width = static_cast<int>(*std::max_element(offsets.begin(), offsets.end()) + call.ranges.cols);
  }
  call.check_gates(gates, a_index, b_index, scales, scaling, mix, kLora);
  call.dropout = check_dropout(seed, dropout_p, x);
  return call;
}

std::tuple<Tensor, Tensor> gated_lora_forward(Tensor x, Tensor lora_a, Tensor lora_b, OptionalTensor a_index,
                                              OptionalTensor b_index, Tensor gates, OptionalTensor scales,
                                              OptionalTensor base, OptionalTensor seed, double scaling, int64_t groups,
                                              std::vector<int64_t> offsets, double dropout_p, std::string mix) {
  GatedCall call = gated_lora_call(x, lora_a, lora_b, a_index, b_index, gates, scales, "base", base, seed, scaling,
                                   groups, offsets, dropout_p, mix);
  Device device = check_device("x", x);
  Tensor out = allocate(x, {call.batch, call.tokens, call.width});
  GatedRows rows(call, base, out);
  run_gated_forward(call, device, rows);
  return {out, rows.t};
}

Tensor gated_lora_forward_inplace(Tensor x, Tensor lora_a, Tensor lora_b, OptionalTensor a_index,
                                  OptionalTensor b_index, Tensor gates, OptionalTensor scales, Tensor base,
                                  OptionalTensor seed, double scaling, int64_t groups, std::vector<int64_t> offsets,
                                  double dropout_p, std::string mix) {
  GatedCall call = gated_lora_call(x, lora_a, lora_b, a_index, b_index, gates, scales, "base", base, seed, scaling,
                                   groups, offsets, dropout_p, mix);
  if (!base.is_contiguous()) fail("base", "a tensor that is not contiguous", "a contiguous one to be overwritten");
  Device device = check_device("x", x);
  call.ranges.gaps = 0;
  GatedRows rows(call, base, base);
  run_gated_forward(call, device, rows);
  return rows.t;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_lora_backward(
    Tensor grad_out, Tensor x, Tensor t, Tensor lora_a, Tensor lora_b, OptionalTensor a_index, OptionalTensor b_index,
    Tensor gates, OptionalTensor scales, OptionalTensor seed, bool need_x, bool need_a, bool need_b, bool need_gates,
    double scaling, int64_t groups, std::vector<int64_t> offsets, double dropout_p, std::string mix) {
  GatedCall call = gated_lora_call(x, lora_a, lora_b, a_index, b_index, gates, scales, "grad_out", grad_out, seed,
                                   scaling, groups, offsets, dropout_p, mix);
  check_like("t", t, "x", x);
  check_sizes("t", t, "[B, S, slots * groups * r]", {call.batch, call.tokens, call.down_slots() * call.ranks});
  Device device = check_device("x", x);
  GatedGrads grads = run_gated_backward(call, device, grad_out, t, {need_x, need_a, need_b, need_gates, false}, false);
  return {grads.x, grads.down, grads.up, grads.gates};
}

std::tuple<Tensor, Tensor> gated_adapter_forward(Tensor x, Tensor down_weight, OptionalTensor down_bias,
                                                 Tensor up_weight, OptionalTensor up_bias, OptionalTensor down_index,
                                                 OptionalTensor up_index, Tensor gates, OptionalTensor residual,
                                                 bool add_input, std::string activation, std::string mix) {
  GatedCall call = adapter_call(x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, gates, add_input,
                                activation, mix);
  if (!add_input && residual.has_value()) call.check_rows("residual", *residual);
  Device device = check_device("x", x);
  Tensor out = allocate(x, {call.batch, call.tokens, call.width});
  GatedRows rows(call, add_input ? OptionalTensor(x) : residual, out);
  run_gated_forward(call, device, rows);
  return {out, rows.t};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_adapter_backward(
    Tensor grad_out, Tensor x, Tensor pre, Tensor down_weight, Tensor up_weight, OptionalTensor up_bias,
    OptionalTensor down_index, OptionalTensor up_index, Tensor gates, bool need_input, bool need_down, bool need_up,
    bool need_gates, bool add_input, std::string activation, std::string mix) {
  GatedCall call = adapter_call(x, down_weight, std::nullopt, up_weight, up_bias, down_index, up_index, gates,
                                add_input, activation, mix);
  call.check_rows("grad_out", grad_out);
  check_like("pre", pre, "x", x);
  check_sizes("pre", pre, "[B, S, slots * r]", {call.batch, call.tokens, call.down_slots() * call.rank});
  Device device = check_device("x", x);
  GatedGrads grads =
      run_gated_backward(call, device, grad_out, pre, {need_input, need_down, need_up, need_gates, add_input}, true);
  return {grads.x, grads.down, grads.down_bias, grads.up, grads.up_bias, grads.gates};
}

}  // namespace adamix
