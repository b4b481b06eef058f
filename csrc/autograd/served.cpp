#include "autograd/served.h"

#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

namespace adamix {
namespace {

// An op, a request and a kind of tensors that kernels were found to serve, of calls within `most`. table:
// backend="auto" chose by it, for a bank of this size; null where a backend was named.
struct Served {
  OpId op;
  std::string backend;
  at::Device device;
  at::ScalarType dtype;
  int64_t size;
  PyObject* table;
  Most most;
  Service service;
};

constexpr size_t kMostServed = 64;
std::vector<Served> served;

PyObject* current_table() {
  static PyObject* const name = interned("table");
  return PyDict_GetItem(python.choices, name);
}

// What is known of such calls, of any rank, or null.
const Served* find(OpId op, const std::string& backend, const at::Tensor& x, const at::Tensor& bank) {
  if (!x.defined() || !bank.defined() || bank.dim() != 3) return nullptr;
  int64_t size = bank.size(0) * bank.size(1);
  for (const Served& known : served) {
    if (known.op == op && known.backend == backend && known.dtype == x.scalar_type() && known.device == x.device() &&
        (known.table == nullptr || (known.size == size && known.table == current_table()))) {
      return &known;
    }
  }
  return nullptr;
}

}  // namespace

Python python;

bool is_plain(const at::Tensor& t) {
  if (!t.defined()) return true;
  constexpr c10::DispatchKeySet usual = c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset |
                                        c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView);
  c10::DispatchKeySet rest = t.key_set() - usual;
  c10::DispatchKey wanted = t.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  return rest == c10::DispatchKeySet(wanted) && !torch::autograd::isFwGradDefined(t);
}

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

bool read(PyObject* given, at::Tensor& t) {
  if (given == Py_None) return true;
  if (!THPVariable_CheckExact(given)) return false;
  t = THPVariable_Unpack(given);
  return is_plain(t);
}

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

bool is_switched_off() {
  static PyObject* const switched_off = interned("_switched_off");
  PyObject* checks = PyDict_GetItem(python.environment, python.check_name);
  if (checks != nullptr && PyObject_RichCompareBool(checks, python.check_value, Py_EQ) != 0) return true;
  return PyObject_IsTrue(PyDict_GetItem(python.direct, switched_off)) != 0;
}

Service service_of(OpId op, const std::string& backend, const at::Tensor& x, const at::Tensor& bank, int64_t groups) {
  const Served* known = find(op, backend, x, bank);
  return known != nullptr && known->most.take(bank.size(1), groups) ? known->service : Service::kNone;
}

void note_served(OpId op, const std::string& backend, const at::Tensor& x, const at::Tensor& bank, const Most& most,
                 Service service) {
  if (find(op, backend, x, bank) != nullptr) return;
  if (served.size() >= kMostServed) served.clear();
  // A reference for good: another table at the same place would look the same.
  PyObject* table = backend == "auto" ? current_table() : nullptr;
  Py_XINCREF(table);
  served.push_back({op, backend, x.device(), x.scalar_type(), bank.size(0) * bank.size(1), table, most, service});
}

void forget_served() { served.clear(); }

PyObject* given_back(const at::Tensor& out) {
  if (!out.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(out);
}

}  // namespace adamix
