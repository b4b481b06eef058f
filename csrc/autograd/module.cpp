// The Python module: routed ops as one call from Python, for tensors and threads that only autograd looks at.
#include <ATen/ops/randint.h>
#include <Python.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <limits>
#include <vector>

#include "autograd/nodes.h"

namespace adamix {
namespace {

enum OpId : long { kAdapter, kLora };

// An op, a request and a kind of tensors that this library's kernels were found to serve. table: backend="auto" chose
// by it, for a bank of this size; null where a backend was named.
struct Served {
  long op;
  std::string backend;
  at::Device device;
  at::ScalarType dtype;
  int64_t size;
  PyObject* table;
};

constexpr size_t kMostServed = 64;
std::vector<Served> served;
// Borrowed for good: dictionaries of modules, and the environment's table of bytes.
PyObject *direct_dict, *auto_dict, *environment, *check_name, *check_value, *switched_name, *table_name;

bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet usual = c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset |
                                        c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView);
  c10::DispatchKeySet rest = t.key_set() - usual;
  c10::DispatchKey wanted = t.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  return rest == c10::DispatchKeySet(wanted) && !torch::autograd::isFwGradDefined(t);
}

// A tensor of no class of its own, or None; false for anything else.
bool read(PyObject* given, at::Tensor& t) {
  if (given == Py_None) return true;
  if (!THPVariable_CheckExact(given)) return false;
  t = THPVariable_Unpack(given);
  return is_plain(t);
}

// Exactly an int or a float: of other classes nothing is known.
bool read(PyObject* given, double& number) {
  if (PyFloat_CheckExact(given)) return number = PyFloat_AS_DOUBLE(given), true;
  if (!PyLong_CheckExact(given)) return false;
  number = PyLong_AsDouble(given);
  return !(number == -1 && PyErr_Occurred() && (PyErr_Clear(), true));
}

bool read(PyObject* given, int64_t& number) {
  if (!PyLong_CheckExact(given)) return false;
  int overflow = 0;
  number = PyLong_AsLongLongAndOverflow(given, &overflow);
  return overflow == 0;
}

bool read(PyObject* given, std::string& text) {
  Py_ssize_t size = 0;
  const char* start = PyUnicode_CheckExact(given) ? PyUnicode_AsUTF8AndSize(given, &size) : nullptr;
  if (start == nullptr) return PyErr_Clear(), false;
  text.assign(start, size);
  return true;
}

bool read(PyObject* given, std::vector<int64_t>& numbers) {
  if (!PyTuple_CheckExact(given) && !PyList_CheckExact(given)) return false;
  Py_ssize_t count = PySequence_Fast_GET_SIZE(given);
  numbers.resize(count);
  for (Py_ssize_t n = 0; n < count; ++n) {
    if (!read(PySequence_Fast_GET_ITEM(given, n), numbers[n])) return false;
  }
  return true;
}

// Whether every call must go the long way: ADAMIX_CHECK=1, or a test switched direct calls off.
bool is_switched_off() {
  PyObject* checks = PyDict_GetItem(environment, check_name);
  if (checks != nullptr && PyObject_RichCompareBool(checks, check_value, Py_EQ) != 0) return true;
  return PyObject_IsTrue(PyDict_GetItem(direct_dict, switched_name)) != 0;
}

PyObject* current_table() { return PyDict_GetItem(auto_dict, table_name); }

bool is_served(long op, const std::string& backend, const at::Tensor& x, const at::Tensor& bank) {
  if (!x.defined() || !bank.defined() || bank.dim() != 3) return false;
  int64_t size = bank.size(0) * bank.size(1);
  for (const Served& known : served) {
    if (known.op == op && known.backend == backend && known.dtype == x.scalar_type() && known.device == x.device() &&
        (known.table == nullptr || (known.size == size && known.table == current_table()))) {
      return true;
    }
  }
  return false;
}

PyObject* given_back(const at::Tensor& out) {
  if (!out.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(out);
}

PyObject* adapter(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Adapter call;
  at::Tensor* tensors[] = {&call.x,       &call.down_weight, &call.down_bias, &call.up_weight,
                           &call.up_bias, &call.down_index,  &call.up_index,  &call.residual};
  TORCH_CHECK(count == 12, "adapter: got ", count, " arguments, expected 12");
  if (is_watched() || is_switched_off()) Py_RETURN_NONE;
  for (int n = 0; n < 8; ++n) {
    if (!read(given[n], *tensors[n])) Py_RETURN_NONE;
  }
  call.add_input = given[8] == Py_True;
  if ((given[9] != Py_None && !read(given[9], call.activation)) || !read(given[10], call.passes) ||
      !read(given[11], call.backend) || !is_served(kAdapter, call.backend, call.x, call.down_weight) ||
      !call.up_weight.defined() || call.up_weight.dim() != 3) {
    Py_RETURN_NONE;
  }
  return given_back(run_adapter(call));
  END_HANDLE_TH_ERRORS
}

PyObject* lora(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Lora call;
  at::Tensor* tensors[] = {&call.x, &call.lora_a, &call.lora_b, &call.a_index, &call.b_index, &call.base, &call.seed};
  TORCH_CHECK(count == 15, "lora: got ", count, " arguments, expected 15");
  if (is_watched() || is_switched_off()) Py_RETURN_NONE;
  for (int n = 0; n < 7; ++n) {
    if (!read(given[n], *tensors[n])) Py_RETURN_NONE;
  }
  if (!read(given[7], call.scaling) || !read(given[8], call.groups) || !read(given[9], call.offsets) ||
      !read(given[10], call.dropout) || !PyBool_Check(given[11]) || !read(given[13], call.passes) ||
      !read(given[14], call.backend) || !is_served(kLora, call.backend, call.x, call.lora_a) ||
      !call.lora_b.defined() || call.lora_b.dim() != 3 || !std::isfinite(call.scaling) ||
      !(call.dropout >= 0 && call.dropout < 1)) {
    Py_RETURN_NONE;
  }
  if (call.dropout == 0) {
    call.seed = at::Tensor();
  } else if (!call.seed.defined()) {
    // As api.py draws it.
    call.seed = at::randint(0, std::numeric_limits<int64_t>::max(), {}, call.x.options().dtype(at::kLong));
  }
  Base base = given[11] != Py_True ? Base::kStays : given[12] == Py_True ? Base::kConsumed : Base::kOverwritten;
  return given_back(run_lora(call, base));
  END_HANDLE_TH_ERRORS
}

// serve(op, backend, x, bank): the kernels serve calls like this one from now on.
PyObject* serve(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  int64_t op = 0;
  std::string backend;
  at::Tensor x, bank;
  TORCH_CHECK(count == 4 && read(given[0], op) && read(given[1], backend) && read(given[2], x) && read(given[3], bank),
              "serve: expected an op's number, a backend, x and a bank");
  if (is_served(op, backend, x, bank)) Py_RETURN_NONE;
  if (served.size() >= kMostServed) served.clear();
  // A reference for good: another table at the same place would look the same.
  PyObject* table = backend == "auto" ? current_table() : nullptr;
  Py_XINCREF(table);
  served.push_back({op, backend, x.device(), x.scalar_type(), bank.size(0) * bank.size(1), table});
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* forget(PyObject*, PyObject*) {
  served.clear();
  Py_RETURN_NONE;
}

// setup(namespace, the dictionary of _direct, that of _auto, the environment, ADAMIX_CHECK and "1" as they stand there)
PyObject* setup(PyObject*, PyObject* given) {
  HANDLE_TH_ERRORS
  const char* name = nullptr;
  if (!PyArg_ParseTuple(given, "sO!O!O!OO", &name, &PyDict_Type, &direct_dict, &PyDict_Type, &auto_dict, &PyDict_Type,
                        &environment, &check_name, &check_value)) {
    return nullptr;
  }
  Py_INCREF(given);
  switched_name = PyUnicode_InternFromString("_switched_off");
  table_name = PyUnicode_InternFromString("table");
  name_ops(name);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"adapter", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(adapter)), METH_FASTCALL, nullptr},
    {"lora", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(lora)), METH_FASTCALL, nullptr},
    {"serve", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(serve)), METH_FASTCALL, nullptr},
    {"forget", forget, METH_NOARGS, nullptr},
    {"setup", setup, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_node", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace adamix

PyMODINIT_FUNC PyInit__node() { return PyModule_Create(&adamix::definition); }
