// The library adamix_cuda: what adamix_kernels/ops/<op>/cuda_impl.py calls.
//
// Every op is registered for all devices, so that the C++ checks see every tensor and can name what is wrong.
#include "registration.h"

namespace adamix {

#if !defined(ADAMIX_ARCHITECTURES)
#define ADAMIX_ARCHITECTURES ""
#endif

// What this shared object holds: "host" for the CPU build of the device code, else the architectures.
std::string build_info() {
#if defined(ADAMIX_HOST)
  return "host";
#else
  return ADAMIX_ARCHITECTURES;
#endif
}

}  // namespace adamix

STABLE_TORCH_LIBRARY(adamix_cuda, m) {
  m.def("build_info() -> str");
  m.def("driver_problem() -> str");
  m.def("device_problem(int device) -> str");
  m.def("tile_columns(int device, int element_bytes) -> int");
  m.def("most_merged(int device) -> int");
  m.def("entries() -> int");
  m.def(
      "routed_adapter_forward(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
      "Tensor? down_index, Tensor? up_index, Tensor? residual, bool add_input, str activation) -> (Tensor, Tensor)");
  m.def(
      "routed_adapter_backward(Tensor grad_out, Tensor x, Tensor pre, Tensor down_weight, Tensor up_weight, "
      "Tensor? down_index, Tensor? up_index, bool need_input, bool need_down, bool need_up, bool add_input, "
      "str activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "routed_lora_forward(Tensor x, Tensor lora_a, Tensor lora_b, Tensor? a_index, Tensor? b_index, Tensor? base, "
      "Tensor? seed, float scaling, int groups, int[] offsets, float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "routed_lora_forward_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor? a_index, Tensor? b_index, "
      "Tensor(a!) base, Tensor? seed, float scaling, int groups, int[] offsets, float dropout_p) -> Tensor");
  m.def(
      "routed_lora_backward(Tensor grad_out, Tensor x, Tensor t, Tensor lora_a, Tensor lora_b, Tensor? a_index, "
      "Tensor? b_index, Tensor? seed, bool need_x, bool need_a, bool need_b, float scaling, int groups, "
      "int[] offsets, float dropout_p) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gated_lora_forward(Tensor x, Tensor lora_a, Tensor lora_b, Tensor? a_index, Tensor? b_index, Tensor gates, "
      "Tensor? scales, Tensor? base, Tensor? seed, float scaling, int groups, int[] offsets, float dropout_p, "
      "str mix) -> (Tensor, Tensor)");
  m.def(
      "gated_lora_forward_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor? a_index, Tensor? b_index, Tensor gates, "
      "Tensor? scales, Tensor(a!) base, Tensor? seed, float scaling, int groups, int[] offsets, float dropout_p, "
      "str mix) -> Tensor");
  m.def(
      "gated_lora_backward(Tensor grad_out, Tensor x, Tensor t, Tensor lora_a, Tensor lora_b, Tensor? a_index, "
      "Tensor? b_index, Tensor gates, Tensor? scales, Tensor? seed, bool need_x, bool need_a, bool need_b, "
      "bool need_gates, float scaling, int groups, int[] offsets, float dropout_p, str mix) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_adapter_forward(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
      "Tensor? down_index, Tensor? up_index, Tensor gates, Tensor? residual, bool add_input, str activation, "
      "str mix) -> (Tensor, Tensor)");
  m.def(
      "gated_adapter_backward(Tensor grad_out, Tensor x, Tensor pre, Tensor down_weight, Tensor up_weight, "
      "Tensor? up_bias, Tensor? down_index, Tensor? up_index, Tensor gates, bool need_input, bool need_down, "
      "bool need_up, bool need_gates, bool add_input, str activation, str mix) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("router_forward(Tensor x, Tensor weight, Tensor? bias, int top_k) -> (Tensor, Tensor, Tensor)");
  m.def(
      "mixture_lora_forward(Tensor x, Tensor lora_a, Tensor lora_b, Tensor router, Tensor? base, Tensor? seed, "
      "int top_k, float scaling, int groups, int[] offsets, float dropout_p) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mixture_lora_forward_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor router, Tensor(a!) base, Tensor? seed, "
      "int top_k, float scaling, int groups, int[] offsets, float dropout_p) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("merge_banks_forward(Tensor[] banks, Tensor?[] scores, int[] offsets, int elements) -> Tensor");
  m.def("merge_experts_forward(Tensor bank, Tensor? scores) -> Tensor");
  m.def(
      "merge_experts_backward(Tensor grad_out, Tensor bank, Tensor? scores, bool need_bank, bool need_scores) "
      "-> (Tensor, Tensor)");
  m.def(
      "merge_lora_forward(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, int groups, int[] offsets, "
      "bool fan_in_fan_out) -> Tensor");
  m.def(
      "merge_loras_forward(Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, float scaling, int groups, "
      "int[] offsets, bool fan_in_fan_out) -> Tensor");
  m.def(
      "merge_lora_banks_forward(Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[] a_scores, "
      "float scaling, int groups, int[] offsets, bool fan_in_fan_out) -> (Tensor, Tensor)");
  m.def(
      "consistency_forward(Tensor logits_a, Tensor logits_b, Tensor? mask, bool detach_target, str reduction, "
      "float expected, Tensor(a!)? da, Tensor(b!)? db) -> (Tensor, Tensor, Tensor)");
  m.def(
      "consistency_backward(Tensor grad, Tensor logits_a, Tensor logits_b, Tensor? mask, Tensor stats, Tensor scale, "
      "bool detach_target, Tensor(a!)? da, Tensor(b!)? db, float? expected) -> ()");
  m.def(
      "adamix_forward(Tensor logits, Tensor labels, Tensor? mask, Tensor? num_items, float weight, int ignore_index, "
      "float label_smoothing, bool detach_target, float expected, Tensor(a!)? d_logits) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adamix_backward(Tensor grad, Tensor logits, Tensor labels, Tensor? mask, Tensor stats, Tensor scales, "
      "float weight, int ignore_index, float label_smoothing, bool detach_target, Tensor(a!) d_logits, "
      "float? expected) -> ()");
  m.def(
      "adamix_chunk(Tensor(a!) logits, Tensor labels, Tensor? mask, Tensor factors, int ignore_index, "
      "float label_smoothing, bool detach_target, bool need_grad) -> Tensor");
  m.def("consistency_rescale(Tensor(a!) gradient, Tensor factor) -> ()");
  m.def(
      "consistency_plan(int rows, int classes, int element_bytes, int capability, int shared_bytes, "
      "int multiprocessors) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(adamix_cuda, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&adamix::build_info));
  m.impl("driver_problem", TORCH_BOX(&adamix::driver_problem));
  m.impl("device_problem", TORCH_BOX(&adamix::device_problem));
  m.impl("tile_columns", TORCH_BOX(&adamix::tile_columns));
  m.impl("most_merged", TORCH_BOX(&adamix::most_merged));
  m.impl("entries", TORCH_BOX(&adamix::entries));
  m.impl("routed_adapter_forward", TORCH_BOX(&adamix::routed_adapter_forward));
  m.impl("routed_adapter_backward", TORCH_BOX(&adamix::routed_adapter_backward));
  m.impl("routed_lora_forward", TORCH_BOX(&adamix::routed_lora_forward));
  m.impl("routed_lora_forward_", TORCH_BOX(&adamix::routed_lora_forward_inplace));
  m.impl("routed_lora_backward", TORCH_BOX(&adamix::routed_lora_backward));
  m.impl("gated_lora_forward", TORCH_BOX(&adamix::gated_lora_forward));
  m.impl("gated_lora_forward_", TORCH_BOX(&adamix::gated_lora_forward_inplace));
  m.impl("gated_lora_backward", TORCH_BOX(&adamix::gated_lora_backward));
  m.impl("gated_adapter_forward", TORCH_BOX(&adamix::gated_adapter_forward));
  m.impl("gated_adapter_backward", TORCH_BOX(&adamix::gated_adapter_backward));
  m.impl("router_forward", TORCH_BOX(&adamix::router_forward));
  m.impl("mixture_lora_forward", TORCH_BOX(&adamix::mixture_lora_forward));
  m.impl("mixture_lora_forward_", TORCH_BOX(&adamix::mixture_lora_forward_inplace));
  m.impl("merge_banks_forward", TORCH_BOX(&adamix::merge_banks_forward));
  m.impl("merge_experts_forward", TORCH_BOX(&adamix::merge_experts_forward));
  m.impl("merge_experts_backward", TORCH_BOX(&adamix::merge_experts_backward));
  m.impl("merge_lora_forward", TORCH_BOX(&adamix::merge_lora_forward));
  m.impl("merge_loras_forward", TORCH_BOX(&adamix::merge_loras_forward));
  m.impl("merge_lora_banks_forward", TORCH_BOX(&adamix::merge_lora_banks_forward));
  m.impl("consistency_forward", TORCH_BOX(&adamix::consistency_forward));
  m.impl("consistency_backward", TORCH_BOX(&adamix::consistency_backward));
  m.impl("adamix_forward", TORCH_BOX(&adamix::adamix_forward));
  m.impl("adamix_backward", TORCH_BOX(&adamix::adamix_backward));
  m.impl("adamix_chunk", TORCH_BOX(&adamix::adamix_chunk));
  m.impl("consistency_rescale", TORCH_BOX(&adamix::consistency_rescale));
  m.impl("consistency_plan", TORCH_BOX(&adamix::consistency_plan));
}
