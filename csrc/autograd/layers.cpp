#include "autograd/layers.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "autograd/attributes.h"
#include "autograd/draws.h"
#include "autograd/linear.h"
#include "autograd/modules.h"
#include "autograd/nodes.h"
#include "autograd/served.h"

namespace adamix {
namespace {

// Attributes of modules.
struct LayersNames {
  PyObject *parameters = interned("_parameters"), *modules = interned("_modules"), *training = interned("training"),
           *gate = interned("gate"), *router = interned("router"), *backend = interned("backend"),
           *activation = interned("activation"), *scaling = interned("scaling"), *groups = interned("groups"),
           *offsets = interned("output_offsets"), *dropout = interned("dropout"), *base = interned("base"),
           *lora_a = interned("lora_a"), *lora_b = interned("lora_b"), *a_score = interned("a_score"),
           *b_score = interned("b_score"), *down_weight = interned("down_weight"), *down_bias = interned("down_bias"),
           *up_weight = interned("up_weight"), *up_bias = interned("up_bias"), *down_score = interned("down_score"),
           *up_score = interned("up_score"), *adapter = interned("adapter");
};

const LayersNames& layers_names() {
  static const LayersNames made;
  return made;
}

// A module in training whose experts are drawn, none chosen and none merged.
struct Layer {
  Attributes own;
  PyObject* parameters;
  PyObject* router;

  explicit Layer(PyObject* module) : own(module), parameters(own.get(layers_names().parameters)), router(nullptr) {
    if (parameters == nullptr || !PyDict_CheckExact(parameters)) return;
    if (!own.has(layers_names().training, Py_True) || !own.has(layers_names().gate, Py_None)) return;
    PyObject* found = own.get(layers_names().router);
    if (found != nullptr && PySet_Contains(python.routers, reinterpret_cast<PyObject*>(Py_TYPE(found))) == 1) {
      router = found;
    }
  }

  // False where something of the instance's own stands in its place.
  bool parameter(PyObject* name, at::Tensor& t) const {
    return own.get(name) == nullptr && read_item(parameters, name, t);
  }

  // Frozen, so that its bank is not merged.
  bool is_frozen(PyObject* name) const {
    at::Tensor score;
    return parameter(name, score) && !score.requires_grad();
  }
};

// Banks that train in float32 beside a 16-bit model are cast for the call, as cast_like does.
void cast(at::Tensor& bank, const at::Tensor& x) {
  if (bank.scalar_type() != x.scalar_type()) bank = bank.to(x.scalar_type());
}

bool is_batch(const at::Tensor& x) { return x.defined() && x.dim() == 3 && x.is_floating_point(); }

// A LoRA module's call but for its base and its draws; false where it is none that kernels were found to serve.
bool read_lora(const Layer& layer, Lora& call) {
  if (layer.router == nullptr || !layer.parameter(layers_names().lora_a, call.lora_a) ||
      !layer.parameter(layers_names().lora_b, call.lora_b) || !layer.is_frozen(layers_names().a_score) ||
      !layer.is_frozen(layers_names().b_score)) {
    return false;
  }
  if (call.lora_a.dim() != 3 || call.lora_b.dim() != 3 || !is_batch(call.x) || call.lora_a.size(2) != call.x.size(2) ||
      !layer.own.read_into(layers_names().scaling, call.scaling) ||
      !layer.own.read_into(layers_names().groups, call.groups) ||
      !layer.own.read_into(layers_names().offsets, call.offsets) ||
      !layer.own.read_into(layers_names().dropout, call.dropout) ||
      !layer.own.read_into(layers_names().backend, call.backend) || !is_usual(call)) {
    return false;
  }
  call.service = service_of(kLora, call.backend, call.x, call.lora_a, call.groups);
  return call.service != Service::kNone;
}

// A module's module of that name; null where there is none.
PyObject* part_of(const Attributes& own, PyObject* name) {
  PyObject* modules = own.get(layers_names().modules);
  return modules == nullptr ? nullptr : PyDict_GetItem(modules, name);
}

bool draw(Draws& draws, const Layer& layer, Lora& call) {
  return draws.take(layer.router, call.x, {call.lora_a.size(0), call.lora_b.size(0)}, {&call.a_index, &call.b_index},
                    call.passes);
}

at::Tensor run_drawn(Lora& call, Draws& draws, Base base) {
  for (at::Tensor* bank : {&call.lora_a, &call.lora_b}) cast(*bank, call.x);
  draw_seed(call);
  at::Tensor out = run_lora(call, base);
  if (out.defined()) draws.keep();
  return out;
}

// An adapter module's call but for its draws, of x like `like` but of `features`; false where it is none that kernels
// were found to serve.
bool read_adapter(const Layer& layer, const at::Tensor& like, int64_t features, Adapter& call) {
  if (layer.router == nullptr || !layer.parameter(layers_names().down_weight, call.down_weight) ||
      !layer.parameter(layers_names().down_bias, call.down_bias) ||
      !layer.parameter(layers_names().up_weight, call.up_weight) ||
      !layer.parameter(layers_names().up_bias, call.up_bias) || !layer.is_frozen(layers_names().down_score) ||
      !layer.is_frozen(layers_names().up_score)) {
    return false;
  }
  PyObject* activation = layer.own.get(layers_names().activation);
  if (call.down_weight.dim() != 3 || call.up_weight.dim() != 3 || !is_batch(like) ||
      call.down_weight.size(2) != features || activation == nullptr ||
      (activation != Py_None && !read(activation, call.activation)) ||
      !layer.own.read_into(layers_names().backend, call.backend)) {
    return false;
  }
  call.service = service_of(kAdapter, call.backend, like, call.down_weight, 1);
  return call.service != Service::kNone;
}

bool draw(Draws& draws, const Layer& layer, const at::Tensor& like, Adapter& call) {
  return draws.take(layer.router, like, {call.down_weight.size(0), call.up_weight.size(0)},
                    {&call.down_index, &call.up_index}, call.passes);
}

at::Tensor run_drawn(Adapter& call, Draws& draws) {
  for (at::Tensor* bank : {&call.down_weight, &call.down_bias, &call.up_weight, &call.up_bias}) cast(*bank, call.x);
  at::Tensor out = run_adapter(call);
  if (out.defined()) draws.keep();
  return out;
}

// What the base layer gave alone, for Python to go on with.
PyObject* only_base(const FrozenLinear& linear, const at::Tensor& x, const at::Tensor& base) {
  record_linear(linear, x, base);
  PyObject* wrapped = THPVariable_Wrap(base);
  return wrapped == nullptr ? nullptr : Py_BuildValue("(N)", wrapped);
}

}  // namespace

PyObject* lora_on_linear(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 2, "lora_on_linear: got ", count, " arguments, expected 2");
  if (is_watched() || is_switched_off()) Py_RETURN_NONE;
  Layer layer(given[0]);
  Lora call;
  PyObject* base = part_of(layer.own, layers_names().base);
  if (base == nullptr || !read(given[1], call.x) || !call.x.defined() ||
      !read_frozen_linear(base, call.x, call.linear) || !read_lora(layer, call)) {
    Py_RETURN_NONE;
  }
  Draws draws;
  if (!draw(draws, layer, call)) Py_RETURN_NONE;
  call.base = linear_output(call.linear, call.x);
  at::Tensor out = run_drawn(call, draws, Base::kOwned);
  return out.defined() ? THPVariable_Wrap(out) : only_base(call.linear, call.x, call.base);
  END_HANDLE_TH_ERRORS
}

PyObject* lora_layer(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 3, "lora_layer: got ", count, " arguments, expected 3");
  if (is_watched() || is_switched_off()) Py_RETURN_NONE;
  Layer layer(given[0]);
  Lora call;
  PyObject* base = part_of(layer.own, layers_names().base);
  if (base == nullptr || !read(given[1], call.x) || !read(given[2], call.base) || !call.x.defined() ||
      !call.base.defined() || call.base.dim() != 3 || call.base.scalar_type() != call.x.scalar_type() ||
      !read_lora(layer, call)) {
    Py_RETURN_NONE;
  }
  bool over = Py_TYPE(given[2]) == reinterpret_cast<PyTypeObject*>(THPVariableClass) && call.base.is_contiguous() &&
              is_plain_linear(base);
  Draws draws;
  if (!draw(draws, layer, call)) Py_RETURN_NONE;
  return given_back(run_drawn(call, draws, over ? Base::kConsumed : Base::kStays));
  END_HANDLE_TH_ERRORS
}

PyObject* adapter_on_linear(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 2, "adapter_on_linear: got ", count, " arguments, expected 2");
  if (is_watched() || is_switched_off()) Py_RETURN_NONE;
  Attributes own(given[0]);
  PyObject *base = part_of(own, layers_names().base), *adapter = part_of(own, layers_names().adapter);
  if (base == nullptr || adapter == nullptr || own.get(layers_names().base) != nullptr ||
      own.get(layers_names().adapter) != nullptr) {
    Py_RETURN_NONE;
  }
  PyObject* known = known_class(python.adapters, adapter);
  if (known == nullptr || known == Py_None) Py_RETURN_NONE;
  Layer layer(adapter);
  Adapter call;
  if (!is_as_written(layer.own, known, {}) || !read(given[1], call.before) || !call.before.defined() ||
      !read_frozen_linear(base, call.before, call.linear) ||
      !read_adapter(layer, call.before, call.linear.weight.size(call.linear.transposed ? 1 : 0), call)) {
    Py_RETURN_NONE;
  }
  Draws draws;
  if (!draw(draws, layer, call.before, call)) Py_RETURN_NONE;
  call.x = linear_output(call.linear, call.before), call.add_input = true;
  at::Tensor out = run_drawn(call, draws);
  return out.defined() ? THPVariable_Wrap(out) : only_base(call.linear, call.before, call.x);
  END_HANDLE_TH_ERRORS
}

PyObject* adapter_layer(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 3, "adapter_layer: got ", count, " arguments, expected 3");
  if (is_watched() || is_switched_off()) Py_RETURN_NONE;
  Layer layer(given[0]);
  Adapter call;
  if (!read(given[1], call.x) || !call.x.defined() || call.x.dim() == 0 || !read(given[2], call.residual) ||
      !read_adapter(layer, call.x, call.x.size(-1), call)) {
    Py_RETURN_NONE;
  }
  call.add_input = given[2] == Py_None || given[2] == given[1];
  if (call.add_input) call.residual = at::Tensor();
  Draws draws;
  return draw(draws, layer, call.x, call) ? given_back(run_drawn(call, draws)) : given_back({});
  END_HANDLE_TH_ERRORS
}

}  // namespace adamix
