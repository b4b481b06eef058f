#include "autograd/draws.h"

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/utils/object_ptr.h>

#include <tuple>
#include <utility>

#include "autograd/attributes.h"
#include "autograd/served.h"

namespace adamix {
namespace {

// Attributes of a router.
struct DrawsNames {
  PyObject *enabled = interned("enabled"), *experts = interned("experts"), *force_merged = interned("force_merged"),
           *level = interned("level"), *passes = interned("passes"), *ahead = interned("_ahead"),
           *batch = interned("batch"), *sample = interned("sample"), *draw = interned("_draw_all");
};

const DrawsNames& draws_names() {
  static const DrawsNames made;
  return made;
}

// As draws.py's _is_recomputed.
bool is_recomputed() {
  return !at::GradMode::is_enabled() || torch::autograd::get_current_graph_task_id() != -1 ||
         at::SavedTensorDefaultHooks::get_hooks(true).has_value();
}

// The key of the last look stays: all layers of a model ask for the same.
PyObject* key_of(int64_t experts, int64_t drawn, const at::Device& device) {
  static PyObject* key = nullptr;
  static std::tuple<int64_t, int64_t, at::Device> known(-1, -1, at::kCPU);
  std::tuple<int64_t, int64_t, at::Device> wanted(experts, drawn, device);
  if (key == nullptr || known != wanted) {
    PyObject* made =
        Py_BuildValue("(L(L)N)", static_cast<long long>(experts), static_cast<long long>(drawn), THPDevice_New(device));
    if (made == nullptr) throw python_error();
    Py_XDECREF(key);
    key = made, known = wanted;
  }
  Py_INCREF(key);
  return key;
}

// What is left for layers that ask for the like, of a draw that the first of them makes; null where each makes its own.
// The router and `ahead` are held by who asks: the draw may let other threads run.
THPObjectPtr found(PyObject* router, PyObject* ahead, int64_t experts, int64_t drawn, const at::Device& device) {
  THPObjectPtr key(key_of(experts, drawn, device));
  PyObject* left = PyDict_GetItem(ahead, key.get());
  if (left != nullptr && PyList_CheckExact(left) && PyList_GET_SIZE(left) > 0) {
    Py_INCREF(left);
    return THPObjectPtr(left);
  }
  THPObjectPtr made(PyObject_CallMethodObjArgs(router, draws_names().draw, ahead, key.get(), nullptr));
  if (!made) throw python_error();
  return made.get() != Py_None && PyList_CheckExact(made.get()) ? std::move(made) : THPObjectPtr();
}

}  // namespace

Draws::~Draws() {
  if (count_ == 0) return;
  PyObject *type, *value, *trace;  // of an error that is on its way
  PyErr_Fetch(&type, &value, &trace);
  for (size_t n = count_; n > 0; --n) PyList_Append(from_[n - 1], taken_[n - 1]);
  keep();
  PyErr_Restore(type, value, trace);
}

bool Draws::take(PyObject* router, const at::Tensor& x, std::array<int64_t, 2> experts,
                 std::array<at::Tensor*, 2> index, int64_t& passes) {
  Attributes of(router);
  PyObject *ahead = of.get(draws_names().ahead), *level = of.get(draws_names().level);
  if (ahead == nullptr || !PyDict_CheckExact(ahead) || level == nullptr || !of.has(draws_names().enabled, Py_True) ||
      !of.has(draws_names().experts, Py_None) || !of.has(draws_names().force_merged, Py_False) || is_recomputed()) {
    return false;
  }
  Py_INCREF(router), Py_INCREF(ahead);
  THPObjectPtr asked(router), into(ahead);  // another thread may begin a forward during a draw
  int64_t drawn = x.size(0);
  if (PyObject_RichCompareBool(level, draws_names().batch, Py_EQ) == 1) {
    if (!of.read_into(draws_names().passes, passes) || passes < 1) return false;
    if (x.size(0) % passes != 0) passes = 1;
    drawn = passes;
  } else if (PyObject_RichCompareBool(level, draws_names().sample, Py_EQ) != 1) {
    return false;
  }
  for (size_t n = 0; n < 2; ++n) {
    if (experts[n] == 1) continue;
    THPObjectPtr left = found(router, ahead, experts[n], drawn, x.device());
    if (!left || !pop(left.get(), *index[n])) return false;
  }
  return true;
}

void Draws::keep() {
  for (; count_ > 0; --count_) Py_DECREF(from_[count_ - 1]), Py_DECREF(taken_[count_ - 1]);
}

bool Draws::pop(PyObject* left, at::Tensor& index) {
  Py_ssize_t size = PyList_GET_SIZE(left);
  if (size == 0 || !read(PyList_GET_ITEM(left, size - 1), index)) return false;
  PyObject* last = PyList_GET_ITEM(left, size - 1);
  Py_INCREF(last), Py_INCREF(left);
  PyList_SetSlice(left, size - 1, size, nullptr);
  from_[count_] = left, taken_[count_++] = last;
  return true;
}

}  // namespace adamix
