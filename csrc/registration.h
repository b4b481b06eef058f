// The functions behind the dispatcher's ops, one line for each; registration.cpp has their schemas.
#pragma once

#include "common/checks.h"

namespace adamix {

std::string driver_problem();
std::string device_problem(int64_t device);
// The most narrow columns that a tile of the routed ops' kernels holds there, of elements of 2 or 4 bytes.
int64_t tile_columns(int64_t device, int64_t element_bytes);
// The most experts of a bank that is merged there, whose scores are of float32.
int64_t most_merged(int64_t device);
// The address of entries.h's table.
int64_t entries();

std::tuple<Tensor, Tensor> routed_adapter_forward(Tensor x, Tensor down_weight, OptionalTensor down_bias,
                                                  Tensor up_weight, OptionalTensor up_bias, OptionalTensor down_index,
                                                  OptionalTensor up_index, OptionalTensor residual, bool add_input,
                                                  std::string activation);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routed_adapter_backward(
    Tensor grad_out, Tensor x, Tensor pre, Tensor down_weight, Tensor up_weight, OptionalTensor down_index,
    OptionalTensor up_index, bool need_input, bool need_down, bool need_up, bool add_input, std::string activation);

std::tuple<Tensor, Tensor> routed_lora_forward(Tensor x, Tensor lora_a, Tensor lora_b, OptionalTensor a_index,
                                               OptionalTensor b_index, OptionalTensor base, OptionalTensor seed,
                                               double scaling, int64_t groups, std::vector<int64_t> offsets,
                                               double dropout_p);
Tensor routed_lora_forward_inplace(Tensor x, Tensor lora_a, Tensor lora_b, OptionalTensor a_index,
                                   OptionalTensor b_index, Tensor base, OptionalTensor seed, double scaling,
                                   int64_t groups, std::vector<int64_t> offsets, double dropout_p);
std::tuple<Tensor, Tensor, Tensor> routed_lora_backward(Tensor grad_out, Tensor x, Tensor t, Tensor lora_a,
                                                        Tensor lora_b, OptionalTensor a_index, OptionalTensor b_index,
                                                        OptionalTensor seed, bool need_x, bool need_a, bool need_b,
                                                        double scaling, int64_t groups, std::vector<int64_t> offsets,
                                                        double dropout_p);

std::tuple<Tensor, Tensor> gated_lora_forward(Tensor x, Tensor lora_a, Tensor lora_b, OptionalTensor a_index,
                                              OptionalTensor b_index, Tensor gates, OptionalTensor scales,
                                              OptionalTensor base, OptionalTensor seed, double scaling, int64_t groups,
                                              std::vector<int64_t> offsets, double dropout_p, std::string mix);
Tensor gated_lora_forward_inplace(Tensor x, Tensor lora_a, Tensor lora_b, OptionalTensor a_index,
                                  OptionalTensor b_index, Tensor gates, OptionalTensor scales, Tensor base,
                                  OptionalTensor seed, double scaling, int64_t groups, std::vector<int64_t> offsets,
                                  double dropout_p, std::string mix);
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_lora_backward(
    Tensor grad_out, Tensor x, Tensor t, Tensor lora_a, Tensor lora_b, OptionalTensor a_index, OptionalTensor b_index,
    Tensor gates, OptionalTensor scales, OptionalTensor seed, bool need_x, bool need_a, bool need_b, bool need_gates,
    double scaling, int64_t groups, std::vector<int64_t> offsets, double dropout_p, std::string mix);
std::tuple<Tensor, Tensor> gated_adapter_forward(Tensor x, Tensor down_weight, OptionalTensor down_bias,
                                                 Tensor up_weight, OptionalTensor up_bias, OptionalTensor down_index,
                                                 OptionalTensor up_index, Tensor gates, OptionalTensor residual,
                                                 bool add_input, std::string activation, std::string mix);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_adapter_backward(
    Tensor grad_out, Tensor x, Tensor pre, Tensor down_weight, Tensor up_weight, OptionalTensor up_bias,
    OptionalTensor down_index, OptionalTensor up_index, Tensor gates, bool need_input, bool need_down, bool need_up,
    bool need_gates, bool add_input, std::string activation, std::string mix);

std::tuple<Tensor, Tensor, Tensor> router_forward(Tensor x, Tensor weight, OptionalTensor bias, int64_t top_k);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixture_lora_forward(Tensor x, Tensor lora_a, Tensor lora_b,
                                                                        Tensor router, OptionalTensor base,
                                                                        OptionalTensor seed, int64_t top_k,
                                                                        double scaling, int64_t groups,
                                                                        std::vector<int64_t> offsets, double dropout_p);
std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_lora_forward_inplace(Tensor x, Tensor lora_a, Tensor lora_b,
                                                                        Tensor router, Tensor base, OptionalTensor seed,
                                                                        int64_t top_k, double scaling, int64_t groups,
                                                                        std::vector<int64_t> offsets, double dropout_p);

Tensor merge_banks_forward(std::vector<Tensor> banks, std::vector<OptionalTensor> scores, std::vector<int64_t> offsets,
                           int64_t elements);
// Of entries.h alone.
void merge_banks_into(const Tensor& out, const MergedBank* banks, size_t count);
Tensor merge_experts_forward(Tensor bank, OptionalTensor scores);
std::tuple<Tensor, Tensor> merge_experts_backward(Tensor grad_out, Tensor bank, OptionalTensor scores, bool need_bank,
                                                  bool need_scores);
Tensor merge_lora_forward(Tensor weight, Tensor lora_a, Tensor lora_b, double scaling, int64_t groups,
                          std::vector<int64_t> offsets, bool fan_in_fan_out);
Tensor merge_loras_forward(std::vector<Tensor> weights, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                           double scaling, int64_t groups, std::vector<int64_t> offsets, bool fan_in_fan_out);
std::tuple<Tensor, Tensor> merge_lora_banks_forward(std::vector<Tensor> weights, std::vector<Tensor> lora_a,
                                                    std::vector<Tensor> lora_b, std::vector<Tensor> a_scores,
                                                    double scaling, int64_t groups, std::vector<int64_t> offsets,
                                                    bool fan_in_fan_out);

std::tuple<Tensor, Tensor, Tensor> consistency_forward(Tensor logits_a, Tensor logits_b, OptionalTensor mask,
                                                       bool detach_target, std::string reduction, double expected,
                                                       OptionalTensor da, OptionalTensor db);
void consistency_backward(Tensor grad, Tensor logits_a, Tensor logits_b, OptionalTensor mask, Tensor stats,
                          Tensor scale, bool detach_target, OptionalTensor da, OptionalTensor db,
                          std::optional<double> expected);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adamix_forward(Tensor logits, Tensor labels, OptionalTensor mask,
                                                                  OptionalTensor num_items, double weight,
                                                                  int64_t ignore_index, double label_smoothing,
                                                                  bool detach_target, double expected,
                                                                  OptionalTensor d_logits);
void adamix_backward(Tensor grad, Tensor logits, Tensor labels, OptionalTensor mask, Tensor stats, Tensor scales,
                     double weight, int64_t ignore_index, double label_smoothing, bool detach_target, Tensor d_logits,
                     std::optional<double> expected);
Tensor adamix_chunk(Tensor logits, Tensor labels, OptionalTensor mask, Tensor factors, int64_t ignore_index,
                    double label_smoothing, bool detach_target, bool need_grad);
void consistency_rescale(Tensor gradient, Tensor factor);
std::vector<int64_t> consistency_plan(int64_t rows, int64_t classes, int64_t element_bytes, int64_t capability,
                                      int64_t shared_bytes, int64_t multiprocessors);

}  // namespace adamix
