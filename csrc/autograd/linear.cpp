#include "autograd/linear.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <optional>

#include "autograd/attributes.h"
#include "autograd/backward.h"
#include "autograd/modules.h"

namespace adamix {
namespace {

struct LinearNames {
  PyObject *forward = interned("forward"), *parameters = interned("_parameters"), *weight = interned("weight"),
           *bias = interned("bias");
};

const LinearNames& linear_names() {
  static const LinearNames made;
  return made;
}

bool is_frozen_like(const Tensor& t, const Tensor& x) {
  return !t.requires_grad() && t.scalar_type() == x.scalar_type() && t.device() == x.device();
}

// Rows of `made` as [..., C] of `like` [..., K]; made is new memory that nobody else holds.
Tensor with_rows_of(Tensor made, const Tensor& like) {
  int64_t sizes[] = {like.size(0), like.size(1), made.size(1)};
  if (!made.is_contiguous()) made = made.contiguous();
  return resized(std::move(made), sizes);
}

struct FrozenLinearBackward : Node {
  SavedVariable weight;
  bool transposed = false;

  std::string name() const override { return "FrozenLinearBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    weight.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    Gradients out(1);
    if (!grads[0].defined()) return out.take();
    out.set(0, linear_input_grad(grads[0], weight.unpack(), transposed));
    return once_differentiable(out.take(), grads[0]);
  }
};

}  // namespace

bool is_plain_linear(PyObject* module) {
  if (known_class(python.linears, module) == nullptr) return false;
  Attributes own(module);
  return own.get(linear_names().forward) == nullptr && has_no_hooks(own, 3);
}

bool read_frozen_linear(PyObject* module, const Tensor& x, FrozenLinear& linear) {
  PyObject* known = known_class(python.linears, module);
  if (known == nullptr || known == Py_None) return false;
  Attributes own(module);
  PyObject* parameters = own.get(linear_names().parameters);
  if (!is_as_written(own, PyTuple_GET_ITEM(known, 1), {linear_names().weight, linear_names().bias}) ||
      parameters == nullptr || !PyDict_CheckExact(parameters)) {
    return false;
  }
  PyObject* bias = PyDict_GetItem(parameters, linear_names().bias);
  if (bias == nullptr || !read(bias, linear.bias) || !read_item(parameters, linear_names().weight, linear.weight))
    return false;
  linear.transposed = PyTuple_GET_ITEM(known, 0) == Py_True;
  const Tensor& weight = linear.weight;
  return x.dim() == 3 && x.is_contiguous() && x.numel() > 0 && weight.dim() == 2 && weight.numel() > 0 &&
         weight.size(linear.transposed ? 0 : 1) == x.size(2) && is_frozen_like(weight, x) &&
         (linear.bias.defined() ? is_frozen_like(linear.bias, x) : !linear.transposed);
}

Tensor linear_output(const FrozenLinear& linear, const Tensor& x) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (!linear.transposed) {
    std::optional<Tensor> bias = linear.bias.defined() ? std::optional<Tensor>(linear.bias) : std::nullopt;
    return at::linear(x, linear.weight, bias).contiguous();
  }
  return with_rows_of(at::addmm(linear.bias, x.view({-1, x.size(2)}), linear.weight), x);
}

Tensor linear_input_grad(const Tensor& grad_out, const Tensor& weight, bool transposed) {
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor rows = grad_out.reshape({-1, grad_out.size(2)});
  return with_rows_of(at::mm(rows, transposed ? weight.t() : weight), grad_out);
}

void record_linear(const FrozenLinear& linear, const Tensor& x, const Tensor& out) {
  if (!torch::autograd::compute_requires_grad(x)) return;
  auto node = make_node<FrozenLinearBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(x));
  node->weight = saved(linear.weight), node->transposed = linear.transposed;
  torch::autograd::set_history(out, node);
}

}  // namespace adamix
