// Routed ops that autograd records without Python, in the forward and in the backward.
//
// These files see all of torch's C++, unlike the rest of csrc/: what they become serves the very torch it was compiled
// for. They know the ops of registration.cpp by their schemas alone, and call them through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace adamix {

// A tensor that need not be there is undefined. x [B, S, K]; passes: 0, or how many runs of whole samples the indices
// [passes] are of. backend: what the caller asked for, for a backward that goes the long way.
struct Adapter {
  at::Tensor x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual;
  bool add_input;
  std::string activation, backend;
  int64_t passes;
};

struct Lora {
  at::Tensor x, lora_a, lora_b, a_index, b_index, base, seed;
  double scaling;
  int64_t groups;
  std::vector<int64_t> offsets;
  double dropout;
  std::string backend;
  int64_t passes;
};

// What becomes of a LoRA's base: it stays, it is overwritten, or it is and nobody looks at it by its old name again.
enum class Base { kStays, kOverwritten, kConsumed };

// The namespace of the ops that models see, "adamix_kernels".
void name_ops(const std::string& name);

// Whether something besides autograd follows this thread's calls: autocast, a mode, a transform, a tracer, a profiler.
bool is_watched();

// The op's output, as autograd records it; undefined where nothing was done and the long way must be taken.
at::Tensor run_adapter(const Adapter& call);
at::Tensor run_lora(const Lora& call, Base base);

}  // namespace adamix
