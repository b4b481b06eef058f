#include "autograd/nodes.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ops/randint.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <cmath>
#include <exception>
#include <limits>
#include <optional>
#include <utility>

#include "autograd/backward.h"
#include "autograd/served.h"

namespace adamix {
namespace {

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

// What an entry gives; nothing where it raises, before it launches: what it does not take, the long way has words for.
template <typename Entry, typename Call>
auto launched(Entry entry, const Call& call) -> std::optional<decltype(run(entry, call))> {
  try {
    return run(entry, call);
  } catch (const std::exception&) {
    return std::nullopt;
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
  Tensor rows = folded(call.x, call.passes), residual = folded(call.residual, call.passes);
  auto made =
      launched(kernels().adapter_forward,
               AdapterForwardCall{handle(rows), handle(call.down_weight), handle(call.down_bias),
                                  handle(call.up_weight), handle(call.up_bias), handle(call.down_index),
                                  handle(call.up_index), handle(residual), call.add_input, call.activation.c_str()});
  if (!made) return std::nullopt;
  return std::pair(unfolded(std::move(made->at(0)), call.x, call.passes), std::move(made->at(1)));
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
  Tensor rows = folded(call.x, call.passes), base = folded(call.base, call.passes);
  auto made =
      launched(kernels().lora_forward,
               LoraForwardCall{handle(rows),
                               handle(call.lora_a),
                               handle(call.lora_b),
                               handle(call.a_index),
                               handle(call.b_index),
                               handle(base),
                               handle(call.seed),
                               {call.scaling, call.groups, call.offsets.data(), call.offsets.size(), call.dropout},
                               inplace});
  if (!made) return std::nullopt;
  if (inplace) return std::pair(Tensor(), std::move(made->at(0)));
  return std::pair(unfolded(std::move(made->at(0)), call.x, call.passes), std::move(made->at(1)));
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
  const Tensor& source = call.before.defined() ? call.before : call.x;
  if (!torch::autograd::compute_requires_grad(source, call.down_weight, call.down_bias, call.up_weight, call.up_bias,
                                              call.residual)) {
    return out;
  }
  auto node = make_node<AdapterBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(source, call.down_weight, call.down_bias, call.up_weight,
                                                           call.up_bias, call.residual));
  if (call.before.defined()) {
    if (source.requires_grad()) node->weight = saved(call.linear.weight);
    node->on_linear = true, node->transposed = call.linear.transposed;
  }
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
  if (!is_foldable(call.x, call.passes) || !is_like(call.base, call.x) ||
      (inplace && base != Base::kOwned && !is_writable(call)) ||
      (recorded && base == Base::kOverwritten && call.base.is_view()) ||
      has_wrong_id(call.a_index, call.lora_a.size(0)) || has_wrong_id(call.b_index, call.lora_b.size(0))) {
    return {};
  }
  // Before base's version moves: a view would then be asked for its history anew, and give as_strided's.
  torch::autograd::edge_list edges;
  if (recorded) edges = torch::autograd::collect_next_edges(call.x, call.lora_a, call.lora_b, call.base);
  auto made = forward_lora(call, inplace);
  if (!made) return {};
  Tensor out = call.base;
  if (base == Base::kOwned) {
    // Nobody has seen it yet.
  } else if (inplace) {
    // Whoever saved the old value must find out.
    call.base.unsafeGetTensorImpl()->bump_version();
  } else {
    out = std::move(made->first);
  }
  if (!recorded) return out;
  auto node = make_node<LoraBackward>();
  node->set_next_edges(std::move(edges));
  node->x = saved(call.x), node->t = saved(made->second);
  node->lora_a = saved(call.lora_a), node->lora_b = saved(call.lora_b);
  node->a_index = saved(call.a_index), node->b_index = saved(call.b_index), node->seed = saved(call.seed);
  node->scaling = call.scaling, node->groups = call.groups, node->offsets = call.offsets;
  node->dropout = call.dropout, node->passes = call.passes, node->backend = call.backend;
  node->planned = call.service == Service::kPlans;
  if (base == Base::kOwned) {
    if (call.x.requires_grad()) node->weight = saved(call.linear.weight);
    node->on_linear = true, node->transposed = call.linear.transposed;
  }
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
