// The routed ops' functions (registration.h) as plain ones, for csrc/autograd: a trip through the dispatcher costs more
// than all that they check. What is given stays the caller's, and so does what is made. They throw as the ops do.
#pragma once

#include <cstddef>
#include <cstdint>

struct AtenTensorOpaque;

namespace adamix {

// A tensor of torch's C interface (AtenTensorHandle); null for none.
using TensorHandle = AtenTensorOpaque*;

// New memory on the device of `like`; dtype: the number of a scalar type.
using Memory = TensorHandle (*)(TensorHandle like, const int64_t* sizes, size_t dims, int32_t dtype);

struct AdapterForwardCall {
  TensorHandle x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual;
  bool add_input;
  const char* activation;
};

struct AdapterBackwardCall {
  TensorHandle grad_out, x, pre, down_weight, up_weight, down_index, up_index;
  bool need_input, need_down, need_up, add_input;
  const char* activation;
};

struct LoraOptions {
  double scaling;
  int64_t groups;
  const int64_t* offsets;
  size_t offset_count;
  double dropout;
};

struct LoraForwardCall {
  TensorHandle x, lora_a, lora_b, a_index, b_index, base, seed;
  LoraOptions options;
  bool inplace;
};

struct LoraBackwardCall {
  TensorHandle grad_out, x, t, lora_a, lora_b, a_index, b_index, seed;
  bool need_x, need_a, need_b;
  LoraOptions options;
};

// One bank of a list: data [experts, size], contiguous; scores [experts] of float32, or null for the uniform mean. Its
// mean goes to element `offset` of the results.
struct MergedBank {
  const void *data, *scores;
  int64_t experts, size, offset;
};

// out: new memory of the banks' dtype and on their device, one axis.
struct MergeBanksCall {
  TensorHandle out;
  const MergedBank* banks;
  size_t count;
};

// What the op adamix_cuda::entries gives the address of. made: the op's results in their order; of a forward in place t
// alone.
struct Entries {
  int64_t version;
  void (*adapter_forward)(const AdapterForwardCall&, Memory, TensorHandle (&made)[2]);
  void (*adapter_backward)(const AdapterBackwardCall&, Memory, TensorHandle (&made)[5]);
  void (*lora_forward)(const LoraForwardCall&, Memory, TensorHandle (&made)[2]);
  void (*lora_backward)(const LoraBackwardCall&, Memory, TensorHandle (&made)[3]);
  void (*merge_banks)(const MergeBanksCall&);
};

// Raised with every change of the above: a module and a library of two versions do without each other.
constexpr int64_t kEntriesVersion = 2;

}  // namespace adamix
