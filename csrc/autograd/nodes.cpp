#include "autograd/nodes.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/randint.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cmath>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include "autograd/plans.h"
#include "autograd/served.h"

namespace adamix {
namespace {

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

std::string& public_namespace() {
  static std::string name;
  return name;
}

c10::OperatorHandle found(const std::string& name) {
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

c10::IValue optional(const Tensor& t) { return t.defined() ? c10::IValue(t) : c10::IValue(); }

// The same memory in another shape, and nothing of its history.
Tensor reshaped(const Tensor& t, c10::IntArrayRef sizes) {
  auto copy = t.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), true);
  copy->set_sizes_contiguous(sizes);
  return Tensor(std::move(copy));
}

// [B, S, C] -> [passes, B / passes * S, C]
Tensor folded(const Tensor& rows, int64_t passes) {
  if (passes == 0 || !rows.defined()) return rows;
  int64_t batch = rows.size(0), tokens = rows.size(1);
  at::AutoDispatchBelowADInplaceOrView below;
  return reshaped(rows.contiguous(), {passes, batch / passes * tokens, rows.size(2)});
}

// A result of the op that nobody else holds, as [B, S, C] again.
Tensor unfolded(Tensor made, const Tensor& like, int64_t passes) {
  if (passes > 0 && made.dim() == 3) {
    int64_t sizes[] = {like.size(0), like.size(1), made.size(2)};
    made.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  }
  return made;
}

// As Python's once_differentiable: gradients that a graph was asked of raise when it is used.
variable_list once_differentiable(variable_list made, const Tensor& gradient) {
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

SavedVariable saved(const Tensor& t) {
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

// Whether an id lies outside its bank, where a look at it costs nothing; as api.py checks it.
bool has_wrong_id(const Tensor& index, int64_t experts) {
  if (!index.defined() || !index.is_cpu()) return false;
  if (!index.is_contiguous()) return true;
  auto outside = [&](const auto* ids) {
    for (int64_t n = 0; n < index.numel(); ++n) {
      if (ids[n] < 0 || ids[n] >= experts) return true;
    }
    return false;
  };
  if (index.scalar_type() == at::kLong) return outside(index.const_data_ptr<int64_t>());
  return index.scalar_type() != at::kInt || outside(index.const_data_ptr<int32_t>());
}

// Rows that the passes can be made of, and enough of them that something is launched.
bool is_foldable(const Tensor& x, int64_t passes) {
  return x.dim() == 3 && x.numel() > 0 && passes >= 0 && (passes == 0 || x.size(0) % passes == 0);
}

bool is_like(const Tensor& rows, const Tensor& x) {
  return !rows.defined() || (rows.dim() == 3 && rows.size(0) == x.size(0) && rows.size(1) == x.size(1));
}

// As api.py's check_inplace: contiguous, in nobody else's memory, nobody's leaf and all of what it is a view of.
bool is_writable(const Lora& call) {
  const Tensor& base = call.base;
  if (!base.defined() || !base.is_contiguous() || base.is_inference()) return false;
  if (base.scalar_type() != call.x.scalar_type()) return false;
  for (const Tensor* other : {&call.x, &call.lora_a, &call.lora_b}) {
    if (base.is_alias_of(*other)) return false;
  }
  if (!at::GradMode::is_enabled()) return true;
  const at::TensorBase& whole = base.is_view() ? base._base() : base;
  return !(whole.is_leaf() && whole.requires_grad()) && whole.numel() == base.numel() && whole.dim() > 0 &&
         whole.is_contiguous() && whole.size(-1) == base.size(-1) && whole.scalar_type() == base.scalar_type();
}

// Whether the kernel ran; what it does not take, the long way has words for. It raises before it launches.
bool launched(const Kernel& kernel, Stack& stack) {
  try {
    kernel(stack);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace

void name_ops(const std::string& name) { public_namespace() = name; }

bool is_watched() {
  c10::impl::LocalDispatchKeySet here = c10::impl::tls_local_dispatch_key_set();
  return here.included_ != c10::default_included_set || here.excluded_ != c10::default_excluded_set ||
         c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::PythonTorchFunctionTLS::stack_len() > 0 ||
         at::hasCallbacks();
}

bool is_usual(const Lora& call) { return std::isfinite(call.scaling) && call.dropout >= 0 && call.dropout < 1; }

void draw_seed(Lora& call) {
  if (call.dropout == 0) {
    call.seed = Tensor();
  } else if (!call.seed.defined()) {
    call.seed = at::randint(0, std::numeric_limits<int64_t>::max(), {}, call.x.options().dtype(at::kLong));
  }
}

namespace {

// (out, pre); nothing where the long way must be taken.
std::optional<std::pair<Tensor, Tensor>> forward_adapter(const Adapter& call) {
  if (call.service == Service::kPlans) {
    Request request(PlanKind::kAdapter, {call.x, call.down_weight, call.down_bias, call.up_weight, call.up_bias,
                                         call.down_index, call.up_index, call.residual});
    request.put(call.add_input), request.put(call.activation), request.put(call.passes);
    auto made = launch_plan(request);
    if (!made) return std::nullopt;
    return std::pair(std::move(made->at(0)), std::move(made->at(1)));
  }
  static const Kernel forward("routed_adapter_forward");
  Stack stack;
  stack.reserve(10);
  stack.emplace_back(folded(call.x, call.passes));
  stack.emplace_back(call.down_weight);
  stack.emplace_back(optional(call.down_bias));
  stack.emplace_back(call.up_weight);
  stack.emplace_back(optional(call.up_bias));
  stack.emplace_back(optional(call.down_index));
  stack.emplace_back(optional(call.up_index));
  stack.emplace_back(optional(folded(call.residual, call.passes)));
  stack.emplace_back(call.add_input);
  stack.emplace_back(call.activation);
  if (!launched(forward, stack)) return std::nullopt;
  return std::pair(unfolded(std::move(stack[0]).toTensor(), call.x, call.passes), std::move(stack[1]).toTensor());
}

// (out or, in place, nothing; t).
std::optional<std::pair<Tensor, Tensor>> forward_lora(const Lora& call, bool inplace) {
  if (call.service == Service::kPlans) {
    Request request(inplace ? PlanKind::kLoraInPlace : PlanKind::kLora,
                    {call.x, call.lora_a, call.lora_b, call.a_index, call.b_index, call.base, call.seed});
    request.put(call.scaling), request.put(call.groups), request.put(call.offsets);
    request.put(call.dropout), request.put(call.passes);
    auto made = launch_plan(request);
    if (!made) return std::nullopt;
    return std::pair(inplace ? Tensor() : std::move(made->front()), std::move(made->back()));
  }
  static const Kernel forward("routed_lora_forward"), over("routed_lora_forward_");
  Stack stack;
  stack.reserve(11);
  stack.emplace_back(folded(call.x, call.passes));
  stack.emplace_back(call.lora_a);
  stack.emplace_back(call.lora_b);
  stack.emplace_back(optional(call.a_index));
  stack.emplace_back(optional(call.b_index));
  stack.emplace_back(optional(folded(call.base, call.passes)));
  stack.emplace_back(optional(call.seed));
  stack.emplace_back(call.scaling);
  stack.emplace_back(call.groups);
  stack.emplace_back(call.offsets);
  stack.emplace_back(call.dropout);
  if (!launched(inplace ? over : forward, stack)) return std::nullopt;
  Tensor t = std::move(stack.back()).toTensor();
  return std::pair(inplace ? Tensor() : unfolded(std::move(stack[0]).toTensor(), call.x, call.passes), std::move(t));
}

}  // namespace

Tensor run_adapter(const Adapter& call) {
  if (!is_foldable(call.x, call.passes) || !is_like(call.residual, call.x) ||
      has_wrong_id(call.down_index, call.down_weight.size(0)) || has_wrong_id(call.up_index, call.up_weight.size(0))) {
    return {};
  }
  auto made = forward_adapter(call);
  if (!made) return {};
  Tensor out = std::move(made->first);
  if (!torch::autograd::compute_requires_grad(call.x, call.down_weight, call.down_bias, call.up_weight, call.up_bias,
                                              call.residual)) {
    return out;
  }
  auto node = make_node<AdapterBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(call.x, call.down_weight, call.down_bias, call.up_weight,
                                                           call.up_bias, call.residual));
  node->x = saved(call.x), node->pre = saved(made->second);
  node->down_weight = saved(call.down_weight), node->up_weight = saved(call.up_weight);
  node->down_index = saved(call.down_index), node->up_index = saved(call.up_index);
  node->add_input = call.add_input, node->passes = call.passes;
  node->activation = call.activation, node->backend = call.backend;
  node->planned = call.service == Service::kPlans;
  torch::autograd::set_history(out, node);
  return out;
}

Tensor run_lora(const Lora& call, Base base) {
  bool inplace = base != Base::kStays;
  bool recorded = torch::autograd::compute_requires_grad(call.x, call.lora_a, call.lora_b, call.base);
  if (!is_foldable(call.x, call.passes) || !is_like(call.base, call.x) || (inplace && !is_writable(call)) ||
      (recorded && base == Base::kOverwritten && call.base.is_view()) ||
      has_wrong_id(call.a_index, call.lora_a.size(0)) || has_wrong_id(call.b_index, call.lora_b.size(0))) {
    return {};
  }
  auto made = forward_lora(call, inplace);
  if (!made) return {};
  Tensor out = call.base;
  if (inplace) {
    // Whoever saved the old value must find out.
    call.base.unsafeGetTensorImpl()->bump_version();
  } else {
    out = std::move(made->first);
  }
  if (!recorded) return out;
  auto node = make_node<LoraBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(call.x, call.lora_a, call.lora_b, call.base));
  node->x = saved(call.x), node->t = saved(made->second);
  node->lora_a = saved(call.lora_a), node->lora_b = saved(call.lora_b);
  node->a_index = saved(call.a_index), node->b_index = saved(call.b_index), node->seed = saved(call.seed);
  node->scaling = call.scaling, node->groups = call.groups, node->offsets = call.offsets;
  node->dropout = call.dropout, node->passes = call.passes, node->backend = call.backend;
  node->planned = call.service == Service::kPlans;
  if (base == Base::kOverwritten) {
    torch::autograd::rebase_history(out, node);
    return out;
  }
  if (base == Base::kConsumed) {
    // A tensor of its own on base's memory, so that no view stands between two layers.
    const c10::TensorImpl& old = *call.base.unsafeGetTensorImpl();
    out = Tensor(old.shallow_copy_and_detach(old.version_counter(), true));
  }
  torch::autograd::set_history(out, node);
  return out;
}

}  // namespace adamix
