#include "entries.h"

#include "common/checks.h"
#include "registration.h"

namespace adamix {
namespace {

Tensor borrowed(TensorHandle given) {
  TensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(given, &made));
  return Tensor(made);
}

OptionalTensor optional(TensorHandle given) {
  return given == nullptr ? OptionalTensor() : OptionalTensor(borrowed(given));
}

void give(const Tensor& tensor, TensorHandle& made) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &made));
}

template <size_t... N, typename... Results>
void give_all(std::index_sequence<N...>, const std::tuple<Results...>& results, TensorHandle* made) {
  (give(std::get<N>(results), made[N]), ...);
}

template <typename... Results>
void give(const std::tuple<Results...>& results, TensorHandle* made) {
  give_all(std::index_sequence_for<Results...>(), results, made);
}

std::vector<int64_t> offsets_of(const LoraOptions& options) {
  return std::vector<int64_t>(options.offsets, options.offsets + options.offset_count);
}

void adapter_forward(const AdapterForwardCall& call, Memory memory, TensorHandle (&made)[2]) {
  MemoryScope scope(memory);
  give(routed_adapter_forward(borrowed(call.x), borrowed(call.down_weight), optional(call.down_bias),
                              borrowed(call.up_weight), optional(call.up_bias), optional(call.down_index),
                              optional(call.up_index), optional(call.residual), call.add_input, call.activation),
       made);
}

void adapter_backward(const AdapterBackwardCall& call, Memory memory, TensorHandle (&made)[5]) {
  MemoryScope scope(memory);
  give(
      routed_adapter_backward(borrowed(call.grad_out), borrowed(call.x), borrowed(call.pre), borrowed(call.down_weight),
                              borrowed(call.up_weight), optional(call.down_index), optional(call.up_index),
                              call.need_input, call.need_down, call.need_up, call.add_input, call.activation),
      made);
}

void lora_forward(const LoraForwardCall& call, Memory memory, TensorHandle (&made)[2]) {
  MemoryScope scope(memory);
  const LoraOptions& options = call.options;
  if (call.inplace) {
    return give(routed_lora_forward_inplace(borrowed(call.x), borrowed(call.lora_a), borrowed(call.lora_b),
                                            optional(call.a_index), optional(call.b_index), borrowed(call.base),
                                            optional(call.seed), options.scaling, options.groups, offsets_of(options),
                                            options.dropout),
                made[0]);
  }
  give(routed_lora_forward(borrowed(call.x), borrowed(call.lora_a), borrowed(call.lora_b), optional(call.a_index),
                           optional(call.b_index), optional(call.base), optional(call.seed), options.scaling,
                           options.groups, offsets_of(options), options.dropout),
       made);
}

void lora_backward(const LoraBackwardCall& call, Memory memory, TensorHandle (&made)[3]) {
  MemoryScope scope(memory);
  const LoraOptions& options = call.options;
  give(routed_lora_backward(borrowed(call.grad_out), borrowed(call.x), borrowed(call.t), borrowed(call.lora_a),
                            borrowed(call.lora_b), optional(call.a_index), optional(call.b_index), optional(call.seed),
                            call.need_x, call.need_a, call.need_b, options.scaling, options.groups, offsets_of(options),
                            options.dropout),
       made);
}

void merge_banks(const MergeBanksCall& call) { merge_banks_into(borrowed(call.out), call.banks, call.count); }

}  // namespace

int64_t entries() {
  static const Entries table{kEntriesVersion, adapter_forward, adapter_backward,
                             lora_forward,    lora_backward,   merge_banks};
  return reinterpret_cast<int64_t>(&table);
}

}  // namespace adamix
