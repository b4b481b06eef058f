// Autograd's nodes of the routed ops, and what their forwards share with them: rows [B, S, C] as
// [passes, B / passes * S, C].
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/reshape.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "autograd/kernels.h"
#include "autograd/memory.h"
#include "autograd/nodes.h"
#include "autograd/plans.h"
#include "autograd/served.h"

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

// The op that models see, with the backend behind its arguments: for a backward that somebody watches.
inline void run_seen(const c10::OperatorHandle& op, Stack& stack, const std::string& backend) {
  stack.emplace_back(backend);
  at::AutoDispatchBelowAutograd below;
  op.callBoxed(&stack);
}

inline c10::IValue optional(const Tensor& t) { return t.defined() ? c10::IValue(t) : c10::IValue(); }

// [B, S, C] -> [passes, B / passes * S, C]
inline Tensor folded(const Tensor& rows, int64_t passes) {
  if (passes == 0 || !rows.defined()) return rows;
  int64_t sizes[] = {passes, rows.size(0) / passes * rows.size(1), rows.size(2)};
  bool plain = is_plain(rows);
  if (plain && rows.is_contiguous()) return reshaped(rows, sizes);
  at::AutoDispatchBelowADInplaceOrView below;
  return plain ? reshaped(rows.contiguous(), sizes) : at::reshape(rows, sizes);
}

// A contiguous tensor that nobody else holds, in another shape.
inline Tensor resized(Tensor made, c10::IntArrayRef sizes) {
  if (!is_plain(made)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return at::reshape(made, sizes);
  }
  made.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return made;
}

// A result of the op that nobody else holds, as [B, S, C] again.
inline Tensor unfolded(Tensor made, const Tensor& like, int64_t passes) {
  if (passes > 0 && made.dim() == 3) {
    int64_t sizes[] = {like.size(0), like.size(1), made.size(2)};
    return resized(std::move(made), sizes);
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

template <size_t N>
std::array<Tensor, N> taken(Stack& stack) {
  std::array<Tensor, N> made;
  for (size_t n = 0; n < N; ++n) made[n] = std::move(stack[n]).toTensor();
  return made;
}

// Whether a backward may read the tensors' memory: nobody watches, and neither the gradient nor what hooks of saved
// tensors gave back is anything but memory.
template <size_t N>
bool may_read(const std::array<Tensor, N>& given) {
  if (is_watched()) return false;
  for (const Tensor& t : given) {
    if (!is_plain(t)) return false;
  }
  return true;
}

// weight: the frozen layer's that gave x, where this node is that layer's too and what it was given needs a gradient.
struct AdapterBackward : Node {
  SavedVariable x, pre, down_weight, up_weight, down_index, up_index, weight;
  bool add_input = false;
  std::string activation, backend;
  int64_t passes = 0;
  bool planned = false, on_linear = false, transposed = false;

  std::string name() const override { return "RoutedAdapterBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* kept : {&x, &pre, &down_weight, &up_weight, &down_index, &up_index, &weight})
      kept->reset_data();
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
      std::array<Tensor, 7> given = {gradient,           x.unpack(),          pre.unpack(),     down_weight.unpack(),
                                     up_weight.unpack(), down_index.unpack(), up_index.unpack()};
      int64_t folds = planned ? 0 : passes;
      bool direct = !planned && may_read(given);
      for (size_t n = 0; n < 2; ++n) given[n] = folded(given[n], folds);
      std::array<bool, 3> asked = {need[0], need_down, need_up};
      std::array<Tensor, 5> made = direct ? of_kernels(given, asked) : of_stack(given, asked);
      Tensor dx = unfolded(std::move(made[0]), gradient, folds);
      if (on_linear && need[0]) {
        Tensor kept = weight.unpack();
        given = {};
        // As nodes of their own would: the adapter's tensors are gone before the layer's product begins.
        if (!torch::autograd::get_current_graph_task_keep_graph()) x.reset_data(), pre.reset_data();
        dx = linear_input_grad(dx, kept, transposed);
      }
      out.set(0, std::move(dx), need[0]);
      for (size_t n = 1; n < 5; ++n) out.set(n, std::move(made[n]), need[n]);
    }
    return once_differentiable(out.take(), gradient);
  }

 private:
  std::array<Tensor, 5> of_kernels(const std::array<Tensor, 7>& given, std::array<bool, 3> need) {
    return run(kernels().adapter_backward,
               AdapterBackwardCall{handle(given[0]), handle(given[1]), handle(given[2]), handle(given[3]),
                                   handle(given[4]), handle(given[5]), handle(given[6]), need[0], need[1], need[2],
                                   add_input, activation.c_str()});
  }

  std::array<Tensor, 5> of_stack(const std::array<Tensor, 7>& given, std::array<bool, 3> need) {
    Stack stack;
    stack.reserve(13);
    for (const Tensor& t : given) stack.emplace_back(optional(t));
    for (bool flag : {need[0], need[1], need[2], add_input}) stack.emplace_back(flag);
    stack.emplace_back(activation);
    if (planned) {
      run_planned_backward(PlanKind::kAdapterBackward, stack, passes, backend);
    } else {
      static const c10::OperatorHandle seen = found(public_namespace() + "::routed_adapter_backward");
      run_seen(seen, stack, backend);
    }
    return taken<5>(stack);
  }
};

// weight: the frozen layer's whose output the LoRA was added to, where this node is that layer's too and
// x needs a gradient.
struct LoraBackward : Node {
  SavedVariable x, t, lora_a, lora_b, a_index, b_index, seed, weight;
  double scaling = 0, dropout = 0;
  int64_t groups = 1, passes = 0;
  std::vector<int64_t> offsets;
  std::string backend;
  bool planned = false, on_linear = false, transposed = false;

  std::string name() const override { return "RoutedLoRABackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* kept : {&x, &t, &lora_a, &lora_b, &a_index, &b_index, &seed, &weight}) kept->reset_data();
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
      std::array<Tensor, 8> given = {gradient,        x.unpack(),       t.unpack(),       lora_a.unpack(),
                                     lora_b.unpack(), a_index.unpack(), b_index.unpack(), seed.unpack()};
      int64_t folds = planned ? 0 : passes;
      bool direct = !planned && may_read(given);
      for (size_t n = 0; n < 2; ++n) given[n] = folded(given[n], folds);
      std::array<bool, 3> asked = {need[0], need[1], need[2]};
      std::array<Tensor, 3> made = direct ? of_kernels(given, asked) : of_stack(given, asked);
      Tensor dx = unfolded(std::move(made[0]), gradient, folds);
      if (on_linear && need[0]) {
        Tensor whole = linear_input_grad(gradient, weight.unpack(), transposed);
        at::AutoDispatchBelowADInplaceOrView below;
        dx = is_plain(whole) && is_plain(dx) ? whole.add_(dx) : at::add(whole, dx);
      }
      out.set(0, std::move(dx), need[0]);
      for (size_t n = 1; n < 3; ++n) out.set(n, std::move(made[n]), need[n]);
    }
    return once_differentiable(out.take(), gradient);
  }

 private:
  std::array<Tensor, 3> of_kernels(const std::array<Tensor, 8>& given, std::array<bool, 3> need) {
    return run(kernels().lora_backward, LoraBackwardCall{handle(given[0]),
                                                         handle(given[1]),
                                                         handle(given[2]),
                                                         handle(given[3]),
                                                         handle(given[4]),
                                                         handle(given[5]),
                                                         handle(given[6]),
                                                         handle(given[7]),
                                                         need[0],
                                                         need[1],
                                                         need[2],
                                                         {scaling, groups, offsets.data(), offsets.size(), dropout}});
  }

  std::array<Tensor, 3> of_stack(const std::array<Tensor, 8>& given, std::array<bool, 3> need) {
    Stack stack;
    stack.reserve(16);
    for (const Tensor& kept : given) stack.emplace_back(optional(kept));
    for (bool flag : need) stack.emplace_back(flag);
    stack.emplace_back(scaling);
    stack.emplace_back(groups);
    stack.emplace_back(offsets);
    stack.emplace_back(dropout);
    if (planned) {
      run_planned_backward(PlanKind::kLoraBackward, stack, passes, backend);
    } else {
      static const c10::OperatorHandle seen = found(public_namespace() + "::routed_lora_backward");
      run_seen(seen, stack, backend);
    }
    return taken<3>(stack);
  }
};

}  // namespace adamix
