// Routed ops that autograd records without Python, in the forward and in the backward.
//
// These files see all of torch's C++, unlike the rest of csrc/: what they become serves the very torch it was compiled
// for. The library's kernels they call through entries.h. Triton's kernels they launch themselves, as a plan says.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "autograd/linear.h"

namespace adamix {

// What serves a call: nothing here, the library's kernels, or plans of Triton's (plans.h).
enum class Service { kNone, kKernels, kPlans };

// A tensor that need not be there is undefined. x [B, S, K]; passes: 0, or how many runs of whole samples the indices
// [passes] are of. backend: what the caller asked for, for a backward that goes the long way.
// before: what the frozen layer `linear` was given to make x of it, where the two are one node.
struct Adapter {
  at::Tensor x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual, before;
  FrozenLinear linear;
  bool add_input = false;
  std::string activation, backend;
  int64_t passes = 0;
  Service service = Service::kNone;
};

// linear: what gave base, where base is `kOwned`.
struct Lora {
  at::Tensor x, lora_a, lora_b, a_index, b_index, base, seed;
  FrozenLinear linear;
  double scaling = 0;
  int64_t groups = 1;
  std::vector<int64_t> offsets;
  double dropout = 0;
  std::string backend;
  int64_t passes = 0;
  Service service = Service::kNone;
};

// What becomes of a LoRA's base: it stays, it is overwritten, or it is and nobody looks at it by its old name again, or
// it has no history and nobody else holds it.
enum class Base { kStays, kOverwritten, kConsumed, kOwned };

// The namespace of the ops that models see, "adamix_kernels".
void name_ops(const std::string& name);

// Whether something besides autograd follows this thread's calls: autocast, a mode, a transform, a tracer, a profiler.
bool is_watched();

// Whether the numbers are such as api.py lets through.
bool is_usual(const Lora& call);

// A seed where there is none and dropout needs one, as api.py draws it; none where it does not.
void draw_seed(Lora& call);

// Under the GIL: the op's output, as autograd records it; undefined where nothing was done and the long way must be
// taken.
at::Tensor run_adapter(const Adapter& call);
at::Tensor run_lora(const Lora& call, Base base);

}  // namespace adamix
