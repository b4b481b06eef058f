// Autograd's nodes of the routed ops, and what their forwards share with them: the kernels of registration.cpp, and
// rows [B, S, C] as [passes, B / passes * S, C]. For nodes.cpp alone.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "autograd/nodes.h"
#include "autograd/plans.h"

namespace adamix {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Stack = torch::jit::Stack;
// shared_ptr or intrusive_ptr: it changed with torch 2.13.
using NodePtr = decltype(std::declval<Node&>().getptr());

template <typename Made, typename... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    return std::shared_ptr<Made>(new Made(std::forward<Arguments>(arguments)...), [](Made* made) { deleteNode(made); });
  } else {
    return c10::make_intrusive<Made>(std::forward<Arguments>(arguments)...);
  }
}

inline std::string& public_namespace() {
  static std::string name;
  return name;
}

inline c10::OperatorHandle found(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
}

// A kernel of registration.cpp, called below autograd.
class Kernel {
 public:
  explicit Kernel(const char* name) : op_(found(std::string("adamix_cuda::") + name)) {}
  void operator()(Stack& stack) const {
    at::AutoDispatchBelowADInplaceOrView below;
    op_.callBoxed(&stack);
  }

 private:
  c10::OperatorHandle op_;
};

// A backward's kernel or, for whoever watches, the op that models see, with the backend behind its arguments.
class Backward {
 public:
  explicit Backward(const char* name) : kernel_(name), seen_(found(public_namespace() + "::" + name)) {}
  void operator()(Stack& stack, const std::string& backend) const {
    if (!is_watched()) return kernel_(stack);
    stack.emplace_back(backend);
    at::AutoDispatchBelowAutograd below;
    seen_.callBoxed(&stack);
  }

 private:
  Kernel kernel_;
  c10::OperatorHandle seen_;
};

inline c10::IValue optional(const Tensor& t) { return t.defined() ? c10::IValue(t) : c10::IValue(); }

// The same memory in another shape, and nothing of its history.
inline Tensor reshaped(const Tensor& t, c10::IntArrayRef sizes) {
  auto copy = t.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), true);
  copy->set_sizes_contiguous(sizes);
  return Tensor(std::move(copy));
}

// [B, S, C] -> [passes, B / passes * S, C]
inline Tensor folded(const Tensor& rows, int64_t passes) {
  if (passes == 0 || !rows.defined()) return rows;
  int64_t batch = rows.size(0), tokens = rows.size(1);
  at::AutoDispatchBelowADInplaceOrView below;
  return reshaped(rows.contiguous(), {passes, batch / passes * tokens, rows.size(2)});
}

// A result of the op that nobody else holds, as [B, S, C] again.
inline Tensor unfolded(Tensor made, const Tensor& like, int64_t passes) {
  if (passes > 0 && made.dim() == 3) {
    int64_t sizes[] = {like.size(0), like.size(1), made.size(2)};
    made.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  }
  return made;
}

// As Python's once_differentiable: gradients that a graph was asked of raise when it is used.
inline variable_list once_differentiable(variable_list made, const Tensor& gradient) {
  if (!at::GradMode::is_enabled() || !gradient.requires_grad()) return made;
  for (Tensor& t : made) {
    if (t.defined()) t = t.detach().set_requires_grad(true);
  }
  auto refusing = make_node<torch::autograd::DelayedError>(
      "trying to differentiate twice a function that was marked with @once_differentiable",
      static_cast<int64_t>(made.size()));
  return refusing->apply(std::move(made));
}

// A node's results, in the order of its edges.
class Gradients {
 public:
  explicit Gradients(size_t count) : made_(count) {}
  void set(size_t n, Tensor value, bool wanted = true) {
    if (wanted) made_[n] = std::move(value);
  }
  variable_list take() { return std::move(made_); }

 private:
  variable_list made_;
};

inline SavedVariable saved(const Tensor& t) {
  return t.defined() ? SavedVariable(t, false) : SavedVariable(std::optional<Tensor>(), false);
}

struct AdapterBackward : Node {
  SavedVariable x, pre, down_weight, up_weight, down_index, up_index;
  bool add_input = false;
  std::string activation, backend;
  int64_t passes = 0;
  bool planned = false;

  std::string name() const override { return "RoutedAdapterBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* kept : {&x, &pre, &down_weight, &up_weight, &down_index, &up_index}) kept->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    Gradients out(6);
    const Tensor& gradient = grads[0];
    if (!gradient.defined()) return out.take();
    bool need[6];
    for (size_t n = 0; n < 6; ++n) need[n] = task_should_compute_output(n);
    if (need[5]) out.set(5, gradient);
    bool need_down = need[1] || need[2], need_up = need[3] || need[4];
    if (need[0] || need_down || need_up) {
      Tensor given = x.unpack();
      int64_t folds = planned ? 0 : passes;
      Stack stack;
      stack.reserve(13);
      for (const Tensor& t :
           {folded(gradient, folds), folded(given, folds), pre.unpack(), down_weight.unpack(), up_weight.unpack()}) {
        stack.emplace_back(t);
      }
      stack.emplace_back(optional(down_index.unpack()));
      stack.emplace_back(optional(up_index.unpack()));
      for (bool flag : {need[0], need_down, need_up, add_input}) stack.emplace_back(flag);
      stack.emplace_back(activation);
      if (planned) {
        run_planned_backward(PlanKind::kAdapterBackward, stack, passes, backend);
      } else {
        static const Backward op("routed_adapter_backward");
        op(stack, backend);
      }
      out.set(0, unfolded(std::move(stack[0]).toTensor(), given, folds), need[0]);
      for (size_t n = 1; n < 5; ++n) out.set(n, std::move(stack[n]).toTensor(), need[n]);
    }
    return once_differentiable(out.take(), gradient);
  }
};

struct LoraBackward : Node {
  SavedVariable x, t, lora_a, lora_b, a_index, b_index, seed;
  double scaling = 0, dropout = 0;
  int64_t groups = 1, passes = 0;
  std::vector<int64_t> offsets;
  std::string backend;
  bool planned = false;

  std::string name() const override { return "RoutedLoRABackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* kept : {&x, &t, &lora_a, &lora_b, &a_index, &b_index, &seed}) kept->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    Gradients out(4);
    const Tensor& gradient = grads[0];
    if (!gradient.defined()) return out.take();
    bool need[4];
    for (size_t n = 0; n < 4; ++n) need[n] = task_should_compute_output(n);
    if (need[3]) out.set(3, gradient);
    if (need[0] || need[1] || need[2]) {
      Tensor given = x.unpack();
      int64_t folds = planned ? 0 : passes;
      Stack stack;
      stack.reserve(16);
      for (const Tensor& kept :
           {folded(gradient, folds), folded(given, folds), t.unpack(), lora_a.unpack(), lora_b.unpack()}) {
        stack.emplace_back(kept);
      }
      for (const SavedVariable* kept : {&a_index, &b_index, &seed}) stack.emplace_back(optional(kept->unpack()));
      for (size_t n = 0; n < 3; ++n) stack.emplace_back(need[n]);
      stack.emplace_back(scaling);
      stack.emplace_back(groups);
      stack.emplace_back(offsets);
      stack.emplace_back(dropout);
      if (planned) {
        run_planned_backward(PlanKind::kLoraBackward, stack, passes, backend);
      } else {
        static const Backward op("routed_lora_backward");
        op(stack, backend);
      }
      out.set(0, unfolded(std::move(stack[0]).toTensor(), given, folds), need[0]);
      for (size_t n = 1; n < 3; ++n) out.set(n, std::move(stack[n]).toTensor(), need[n]);
    }
    return once_differentiable(out.take(), gradient);
  }
};

}  // namespace adamix
