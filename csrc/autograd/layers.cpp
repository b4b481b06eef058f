#include "autograd/layers.h"

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <tuple>
#include <utility>

#include "autograd/attributes.h"
#include "autograd/linear.h"
#include "autograd/nodes.h"
#include "autograd/served.h"

namespace adamix {
namespace {

// The names of what is looked up; each is an attribute of modules, of a router, or of torch.nn.modules.module.
struct Names {
  PyObject *parameters = interned("_parameters"), *modules = interned("_modules"), *training = interned("training"),
           *gate = interned("gate"), *router = interned("router"), *backend = interned("backend"),
           *activation = interned("activation"), *scaling = interned("scaling"), *groups = interned("groups"),
           *offsets = interned("output_offsets"), *dropout = interned("dropout"), *base = interned("base"),
           *lora_a = interned("lora_a"), *lora_b = interned("lora_b"), *a_score = interned("a_score"),
           *b_score = interned("b_score"), *down_weight = interned("down_weight"), *down_bias = interned("down_bias"),
           *up_weight = interned("up_weight"), *up_bias = interned("up_bias"), *down_score = interned("down_score"),
           *up_score = interned("up_score"), *enabled = interned("enabled"), *experts = interned("experts"),
           *force_merged = interned("force_merged"), *level = interned("level"), *passes = interned("passes"),
           *ahead = interned("_ahead"), *batch = interned("batch"), *sample = interned("sample");
};

const Names& names() {
  static const Names made;
  return made;
}

// A module in training whose experts are drawn, none chosen and none merged.
struct Layer {
  Attributes own;
  PyObject* parameters;
  PyObject* router;

  explicit Layer(PyObject* module) : own(module), parameters(own.get(names().parameters)), router(nullptr) {
    if (parameters == nullptr || !PyDict_CheckExact(parameters)) return;
    if (!own.has(names().training, Py_True) || !own.has(names().gate, Py_None)) return;
    PyObject* found = own.get(names().router);
    if (found != nullptr && PySet_Contains(python.routers, reinterpret_cast<PyObject*>(Py_TYPE(found))) == 1) {
      router = found;
    }
  }

  bool parameter(PyObject* name, at::Tensor& t) const { return read_item(parameters, name, t); }

  // Frozen, so that its bank is not merged.
  bool is_frozen(PyObject* name) const {
    at::Tensor score;
    return parameter(name, score) && !score.requires_grad();
  }
};

// What routing/draws.py drew for this forward, as Router.draw_sides gives it; what was taken goes back if it is not
// used.
class Draws {
 public:
  ~Draws() {
    if (count_ == 0) return;
    PyObject *type, *value, *trace;  // of an error that is on its way
    PyErr_Fetch(&type, &value, &trace);
    for (size_t n = count_; n > 0; --n) PyList_Append(from_[n - 1], taken_[n - 1]);
    keep();
    PyErr_Restore(type, value, trace);
  }

  // False where the router has to be asked. A bank of one leaves its index as it is.
  bool take(PyObject* router, const at::Tensor& x, std::array<int64_t, 2> experts, std::array<at::Tensor*, 2> index,
            int64_t& passes) {
    Attributes of(router);
    PyObject *ahead = of.get(names().ahead), *level = of.get(names().level);
    if (ahead == nullptr || !PyDict_CheckExact(ahead) || level == nullptr || !of.has(names().enabled, Py_True) ||
        !of.has(names().experts, Py_None) || !of.has(names().force_merged, Py_False) || is_recomputed()) {
      return false;
    }
    int64_t drawn = x.size(0);
    if (PyObject_RichCompareBool(level, names().batch, Py_EQ) == 1) {
      if (!of.read_into(names().passes, passes) || passes < 1) return false;
      if (x.size(0) % passes != 0) passes = 1;
      drawn = passes;
    } else if (PyObject_RichCompareBool(level, names().sample, Py_EQ) != 1) {
      return false;
    }
    for (size_t n = 0; n < 2; ++n) {
      if (experts[n] == 1) continue;
      PyObject* left = found(ahead, experts[n], drawn, x.device());
      if (left == nullptr || !pop(left, *index[n])) return false;
    }
    return true;
  }

  void keep() {
    for (; count_ > 0; --count_) Py_DECREF(from_[count_ - 1]), Py_DECREF(taken_[count_ - 1]);
  }

 private:
  // As draws.py's _is_recomputed.
  static bool is_recomputed() {
    return !at::GradMode::is_enabled() || torch::autograd::get_current_graph_task_id() != -1 ||
           at::SavedTensorDefaultHooks::get_hooks(true).has_value();
  }

  // The key of the last look stays: all layers of a model ask for the same.
  static PyObject* found(PyObject* ahead, int64_t experts, int64_t drawn, const at::Device& device) {
    static PyObject* key = nullptr;
    static std::tuple<int64_t, int64_t, at::Device> known(-1, -1, at::kCPU);
    std::tuple<int64_t, int64_t, at::Device> wanted(experts, drawn, device);
    if (key == nullptr || known != wanted) {
      PyObject* made = Py_BuildValue("(L(L)N)", static_cast<long long>(experts), static_cast<long long>(drawn),
                                     THPDevice_New(device));
      if (made == nullptr) return nullptr;
      Py_XDECREF(key);
      key = made, known = wanted;
    }
    PyObject* left = PyDict_GetItem(ahead, key);
    return left != nullptr && PyList_CheckExact(left) ? left : nullptr;
  }

  bool pop(PyObject* left, at::Tensor& index) {
    Py_ssize_t size = PyList_GET_SIZE(left);
    if (size == 0 || !read(PyList_GET_ITEM(left, size - 1), index)) return false;
    PyObject* last = PyList_GET_ITEM(left, size - 1);
    Py_INCREF(last), Py_INCREF(left);
    PyList_SetSlice(left, size - 1, size, nullptr);
    from_[count_] = left, taken_[count_++] = last;
    return true;
  }

  std::array<PyObject*, 2> from_{}, taken_{};
  size_t count_ = 0;
};

// Banks that train in float32 beside a 16-bit model are cast for the call, as cast_like does.
void cast(at::Tensor& bank, const at::Tensor& x) {
  if (bank.scalar_type() != x.scalar_type()) bank = bank.to(x.scalar_type());
}

bool is_batch(const at::Tensor& x, int64_t features) {
  return x.defined() && x.dim() == 3 && x.is_floating_point() && x.size(2) == features;
}

}  // namespace

namespace {

// A LoRA module's call but for its base and its draws; false where it is none that kernels were found to serve.
bool read_lora(const Layer& layer, Lora& call) {
  if (layer.router == nullptr || !layer.parameter(names().lora_a, call.lora_a) ||
      !layer.parameter(names().lora_b, call.lora_b) || !layer.is_frozen(names().a_score) ||
      !layer.is_frozen(names().b_score)) {
    return false;
  }
  if (call.lora_a.dim() != 3 || call.lora_b.dim() != 3 || !is_batch(call.x, call.lora_a.size(2)) ||
      !layer.own.read_into(names().scaling, call.scaling) || !layer.own.read_into(names().groups, call.groups) ||
      !layer.own.read_into(names().offsets, call.offsets) || !layer.own.read_into(names().dropout, call.dropout) ||
      !layer.own.read_into(names().backend, call.backend) || !is_usual(call)) {
    return false;
  }
  call.service = service_of(kLora, call.backend, call.x, call.lora_a);
  return call.service != Service::kNone;
}

// The module's `base`; null where there is none.
PyObject* base_of(const Layer& layer) {
  PyObject* modules = layer.own.get(names().modules);
  return modules == nullptr ? nullptr : PyDict_GetItem(modules, names().base);
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

}  // namespace

PyObject* lora_on_linear(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 2, "lora_on_linear: got ", count, " arguments, expected 2");
  if (is_watched() || is_switched_off()) Py_RETURN_NONE;
  Layer layer(given[0]);
  Lora call;
  PyObject* base = base_of(layer);
  if (base == nullptr || !read(given[1], call.x) || !call.x.defined() ||
      !read_frozen_linear(base, call.x, call.linear) || !read_lora(layer, call)) {
    Py_RETURN_NONE;
  }
  Draws draws;
  if (!draw(draws, layer, call)) Py_RETURN_NONE;
  call.base = linear_output(call.linear, call.x);
  at::Tensor out = run_drawn(call, draws, Base::kOwned);
  if (out.defined()) return THPVariable_Wrap(out);
  record_linear(call.linear, call.x, call.base);
  PyObject* wrapped = THPVariable_Wrap(call.base);
  return wrapped == nullptr ? nullptr : Py_BuildValue("(N)", wrapped);
  END_HANDLE_TH_ERRORS
}

PyObject* lora_layer(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 3, "lora_layer: got ", count, " arguments, expected 3");
  if (is_watched() || is_switched_off()) Py_RETURN_NONE;
  Layer layer(given[0]);
  Lora call;
  PyObject* base = base_of(layer);
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

PyObject* adapter_layer(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 3, "adapter_layer: got ", count, " arguments, expected 3");
  if (is_watched() || is_switched_off()) Py_RETURN_NONE;
  Layer layer(given[0]);
  Adapter call;
  if (layer.router == nullptr || !read(given[1], call.x) || !read(given[2], call.residual) ||
      !layer.parameter(names().down_weight, call.down_weight) || !layer.parameter(names().down_bias, call.down_bias) ||
      !layer.parameter(names().up_weight, call.up_weight) || !layer.parameter(names().up_bias, call.up_bias) ||
      !layer.is_frozen(names().down_score) || !layer.is_frozen(names().up_score)) {
    Py_RETURN_NONE;
  }
  call.add_input = given[2] == Py_None || given[2] == given[1];
  if (call.add_input) call.residual = at::Tensor();
  PyObject* activation = layer.own.get(names().activation);
  if (call.down_weight.dim() != 3 || call.up_weight.dim() != 3 || !is_batch(call.x, call.down_weight.size(2)) ||
      activation == nullptr || (activation != Py_None && !read(activation, call.activation)) ||
      !layer.own.read_into(names().backend, call.backend)) {
    Py_RETURN_NONE;
  }
  call.service = service_of(kAdapter, call.backend, call.x, call.down_weight);
  if (call.service == Service::kNone) {
    Py_RETURN_NONE;
  }
  Draws draws;
  if (!draws.take(layer.router, call.x, {call.down_weight.size(0), call.up_weight.size(0)},
                  {&call.down_index, &call.up_index}, call.passes)) {
    Py_RETURN_NONE;
  }
  for (at::Tensor* bank : {&call.down_weight, &call.down_bias, &call.up_weight, &call.up_bias}) cast(*bank, call.x);
  at::Tensor out = run_adapter(call);
  if (out.defined()) draws.keep();
  return given_back(out);
  END_HANDLE_TH_ERRORS
}

}  // namespace adamix
