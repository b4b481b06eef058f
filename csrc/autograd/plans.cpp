#include "autograd/plans.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <memory>
#include <unordered_map>
#include <utility>

#include "autograd/driver.h"
#include "autograd/memory.h"
#include "autograd/nodes.h"
#include "autograd/plan.h"
#include "autograd/served.h"

namespace adamix {
namespace {

constexpr size_t kMostPlans = 4096;
using Plans = std::unordered_map<std::string, std::shared_ptr<const Plan>>;

// Touched under the GIL alone. It outlives Python, which could free nothing any more.
Plans& plans() {
  static Plans* const made = new Plans;
  return *made;
}

// What Python's current_stream says: the stream, or nothing.
std::optional<uint64_t> current_stream(int64_t device) {
  PyObject* number = PyLong_FromLongLong(device);
  PyObject* found = number == nullptr ? nullptr : PyObject_CallOneArg(python.current_stream, number);
  Py_XDECREF(number);
  if (found == nullptr) raise();
  std::optional<uint64_t> stream;
  if (found != Py_None) stream = PyLong_AsUnsignedLongLongMask(found);
  Py_DECREF(found);
  return stream;
}

// What of the process's state a plan depends on, as in _triton_plans.py: the table of block sizes, and TF32.
bool put_state(Request& request) {
  PyObject* table = PyDict_GetItem(python.environment, python.table_name);
  if (table != nullptr && !PyBytes_Check(table)) return false;
  request.put(table == nullptr ? std::string() : std::string(PyBytes_AS_STRING(table), PyBytes_GET_SIZE(table)));
  if (request.tensors()[0].scalar_type() != at::kFloat) return true;
  auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return request.put(static_cast<int64_t>(precision)), true;
}

// The results' and scratch memory's addresses behind those of the tensors; false where one is no multiple of 16.
bool add_addresses(const Plan& plan, const std::vector<at::Tensor>& results, const at::Tensor& scratch,
                   std::vector<uint64_t>& values) {
  size_t given = values.size();
  for (const at::Tensor& t : results) values.push_back(t.defined() ? reinterpret_cast<uint64_t>(t.data_ptr()) : 0);
  uint64_t start = scratch.defined() ? reinterpret_cast<uint64_t>(scratch.data_ptr()) : 0;
  for (int64_t offset : plan.offsets) values.push_back(start + offset);
  for (size_t n = given; n < values.size(); ++n) {
    if (values[n] % 16 != 0) return false;
  }
  for (const auto& [n, offset] : plan.parts) values.push_back(values[n] + offset);
  values.insert(values.end(), plan.constants.begin(), plan.constants.end());
  return true;
}

int launch_all(const Plan& plan, uint64_t stream, std::vector<uint64_t>& values) {
  // Triton hands its kernels two addresses of memory that they do not need.
  uint64_t none = 0;
  std::vector<void*> parameters;
  for (const PlannedLaunch& planned : plan.launches) {
    parameters.clear();
    for (size_t n : planned.parameters) parameters.push_back(&values[n]);
    parameters.insert(parameters.end(), 2, &none);
    int code = driver::launch(planned.launch, stream, parameters.data());
    if (code != 0) return code;
  }
  return 0;
}

bool put_option(PyObject* given, Request& request) {
  if (PyBool_Check(given)) return request.put(given == Py_True), true;
  int64_t number = 0;
  if (read(given, number)) return request.put(number), true;
  double value = 0;
  if (PyFloat_CheckExact(given)) return read(given, value), request.put(value), true;
  std::string text;
  if (read(given, text)) return request.put(text), true;
  std::vector<int64_t> numbers;
  return read(given, numbers) && (request.put(c10::IntArrayRef(numbers)), true);
}

// A new reference.
PyObject* to_python(const c10::IValue& value) {
  if (value.isNone()) Py_RETURN_NONE;
  if (value.isTensor()) return THPVariable_Wrap(value.toTensor());
  if (value.isBool()) return PyBool_FromLong(value.toBool());
  if (value.isInt()) return PyLong_FromLongLong(value.toInt());
  if (value.isDouble()) return PyFloat_FromDouble(value.toDouble());
  if (value.isString()) return PyUnicode_FromString(value.toStringRef().c_str());
  std::vector<int64_t> numbers = value.toIntVector();
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(numbers.size()));
  for (size_t n = 0; n < numbers.size(); ++n) PyTuple_SET_ITEM(tuple, n, PyLong_FromLongLong(numbers[n]));
  return tuple;
}

Request request_of(PlanKind kind, const std::vector<c10::IValue>& arguments) {
  std::vector<at::Tensor> tensors;
  size_t n = 0;
  for (; arguments[n].isTensor() || arguments[n].isNone(); ++n) {
    tensors.push_back(arguments[n].isNone() ? at::Tensor() : arguments[n].toTensor());
  }
  Request request(kind, std::move(tensors));
  for (; n < arguments.size(); ++n) {
    const c10::IValue& value = arguments[n];
    if (value.isBool()) {
      request.put(value.toBool());
    } else if (value.isInt()) {
      request.put(value.toInt());
    } else if (value.isDouble()) {
      request.put(value.toDouble());
    } else if (value.isString()) {
      request.put(value.toStringRef());
    } else {
      request.put(c10::IntArrayRef(value.toIntVector()));
    }
  }
  return request;
}

std::vector<at::Tensor> python_backward(PlanKind kind, const std::vector<c10::IValue>& arguments, int64_t passes,
                                        const std::string& backend) {
  at::NoGradGuard no_grad;
  THPObjectPtr given(PyTuple_New(static_cast<Py_ssize_t>(arguments.size() + 3)));
  PyTuple_SET_ITEM(given.get(), 0, PyLong_FromLongLong(static_cast<long long>(kind)));
  PyTuple_SET_ITEM(given.get(), 1, PyLong_FromLongLong(passes));
  PyTuple_SET_ITEM(given.get(), 2, PyUnicode_FromString(backend.c_str()));
  for (size_t n = 0; n < arguments.size(); ++n) PyTuple_SET_ITEM(given.get(), n + 3, to_python(arguments[n]));
  THPObjectPtr made(PyObject_CallObject(python.backward, given.get()));
  if (!made) raise();
  std::vector<at::Tensor> results;
  each(made.get(), [&](PyObject* item) {
    results.push_back(item == Py_None ? at::Tensor() : at::Tensor(THPVariable_Unpack(item)));
  });
  return results;
}

// Python's plans are offered again, when they serve a call.
void offer_again() {
  for (const auto& [key, plan] : plans()) {
    if (PyObject_SetAttrString(plan->source, "kept", Py_False) != 0) PyErr_Clear();
  }
}

class Gil {
 public:
  Gil() : state_(PyGILState_Ensure()) {}
  ~Gil() { PyGILState_Release(state_); }

 private:
  PyGILState_STATE state_;
};

}  // namespace

std::optional<std::vector<at::Tensor>> launch_plan(Request& request) {
  const at::Tensor& like = request.tensors()[0];
  if (!request.fits() || !put_state(request)) return std::nullopt;
  auto found = plans().find(request.key());
  if (found == plans().end()) return std::nullopt;
  // Another thread may forget it while the GIL is released.
  std::shared_ptr<const Plan> held = found->second;
  const Plan& plan = *held;
  std::optional<uint64_t> stream = current_stream(plan.device);
  if (!stream) return std::nullopt;
  at::AutoDispatchBelowADInplaceOrView below;
  std::vector<at::Tensor> results;
  results.reserve(plan.results.size());
  for (const Result& result : plan.results) {
    bool is_nothing = result.sizes.size() == 1 && result.sizes[0] == 0;
    results.push_back(is_nothing ? at::Tensor() : new_memory(like, result.sizes, result.dtype));
  }
  at::Tensor scratch = plan.scratch > 0 ? new_memory(like, {plan.scratch}, like.scalar_type()) : at::Tensor();
  std::vector<uint64_t> values;
  values.reserve(request.tensors().size() + results.size() + plan.offsets.size() + plan.parts.size() +
                 plan.constants.size());
  for (const at::Tensor& t : request.tensors()) {
    values.push_back(t.defined() ? reinterpret_cast<uint64_t>(t.data_ptr()) : 0);
  }
  if (!add_addresses(plan, results, scratch, values)) return std::nullopt;
  int code = 0;
  // A full queue of the GPU must not hold Python up.
  PyThreadState* state = PyEval_SaveThread();
  try {
    driver::ensure_context(static_cast<int>(plan.device));
    code = launch_all(plan, *stream, values);
  } catch (...) {
    PyEval_RestoreThread(state);
    throw;
  }
  PyEval_RestoreThread(state);
  driver::check(code);
  return results;
}

void run_planned_backward(PlanKind kind, std::vector<c10::IValue>& arguments, int64_t passes,
                          const std::string& backend) {
  Gil gil;
  std::optional<std::vector<at::Tensor>> made;
  if (!is_watched() && !is_switched_off()) {
    Request request = request_of(kind, arguments);
    request.put(passes);
    made = launch_plan(request);
  }
  if (!made) made = python_backward(kind, arguments, passes, backend);
  arguments.assign(made->begin(), made->end());
}

PyObject* keep_plan(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  int64_t kind = 0;
  TORCH_CHECK(count == 4 && read(given[0], kind), "keep_plan: expected a kind, tensors, options and a plan");
  std::vector<at::Tensor> tensors;
  bool fits = true;
  each(given[1], [&](PyObject* item) {
    tensors.emplace_back();
    fits = read(item, tensors.back()) && fits;
  });
  if (!fits || tensors.empty() || !tensors[0].defined()) Py_RETURN_NONE;
  Request request(static_cast<PlanKind>(kind), std::move(tensors));
  each(given[2], [&](PyObject* item) { fits = put_option(item, request) && fits; });
  if (!fits || !request.fits() || !put_state(request)) Py_RETURN_NONE;
  PyObject* described = PyObject_CallMethod(given[3], "described", nullptr);
  if (described == nullptr) return nullptr;
  THPObjectPtr owner(described);
  if (described == Py_None) {
    if (PyObject_SetAttrString(given[3], "kept", Py_True) != 0) return nullptr;
    Py_RETURN_NONE;
  }
  std::shared_ptr<Plan> plan = read_plan(described);
  Py_INCREF(given[3]);
  plan->source = given[3];
  // Batches of very many shapes begin anew, as Python's plans do; a call under way holds its own.
  if (plans().size() >= kMostPlans) offer_again(), forget_plans();
  plans().insert_or_assign(request.key(), std::move(plan));
  // Here and not by the caller: until then another thread may have emptied the table.
  if (PyObject_SetAttrString(given[3], "kept", Py_True) != 0) return nullptr;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

void forget_plans() {
  Plans gone;
  gone.swap(plans());
}

}  // namespace adamix
