// The Python module: routed ops as one call from Python, for tensors and threads that only autograd looks at.
#include <Python.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "autograd/kernels.h"
#include "autograd/layers.h"
#include "autograd/merging.h"
#include "autograd/nodes.h"
#include "autograd/plans.h"
#include "autograd/served.h"

namespace adamix {
namespace {

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
      !read(given[11], call.backend) || !call.up_weight.defined() || call.up_weight.dim() != 3) {
    Py_RETURN_NONE;
  }
  call.service = service_of(kAdapter, call.backend, call.x, call.down_weight, 1);
  if (call.service == Service::kNone) Py_RETURN_NONE;
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
      !read(given[14], call.backend) || !call.lora_b.defined() || call.lora_b.dim() != 3 || !is_usual(call)) {
    Py_RETURN_NONE;
  }
  call.service = service_of(kLora, call.backend, call.x, call.lora_a, call.groups);
  if (call.service == Service::kNone) Py_RETURN_NONE;
  draw_seed(call);
  Base base = given[11] != Py_True ? Base::kStays : given[12] == Py_True ? Base::kConsumed : Base::kOverwritten;
  return given_back(run_lora(call, base));
  END_HANDLE_TH_ERRORS
}

// serve(op, backend, x, bank, current_stream, columns, groups): the library's kernels (None), where they are of this
// module's version, or plans serve calls like this one of at most so many from now on.
PyObject* serve(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  int64_t op = 0;
  std::string backend;
  Most most{};
  TORCH_CHECK(count == 7 && read(given[0], op) && read(given[1], backend) && THPVariable_Check(given[2]) &&
                  THPVariable_Check(given[3]) && read(given[5], most.columns) && read(given[6], most.groups),
              "serve: expected an op's number, a backend, x, a bank, current_stream or None, and two limits");
  at::Tensor x, bank;
  if (!read(given[2], x) || !read(given[3], bank)) Py_RETURN_NONE;  // not plain memory
  bool planned = given[4] != Py_None;
  if (planned) {
    Py_INCREF(given[4]);  // for good, a function of a module
    python.current_stream = given[4];
  }
  if (planned || find_kernels())
    note_served(static_cast<OpId>(op), backend, x, bank, most, planned ? Service::kPlans : Service::kKernels);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* forget(PyObject*, PyObject*) {
  forget_served();
  forget_plans();
  Py_RETURN_NONE;
}

// setup(namespace, then what `Python` holds, in its order but for current_stream)
PyObject* setup(PyObject*, PyObject* given) {
  HANDLE_TH_ERRORS
  const char* name = nullptr;
  if (!PyArg_ParseTuple(given, "sO!O!O!O!OOOO!O!O!O", &name, &PyDict_Type, &python.direct, &PyDict_Type,
                        &python.choices, &PyDict_Type, &python.modules, &PyDict_Type, &python.environment,
                        &python.check_name, &python.check_value, &python.table_name, &PySet_Type, &python.routers,
                        &PyDict_Type, &python.linears, &PyDict_Type, &python.adapters, &python.backward)) {
    return nullptr;
  }
  Py_INCREF(given);
  name_ops(name);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"adapter", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(adapter)), METH_FASTCALL, nullptr},
    {"lora", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(lora)), METH_FASTCALL, nullptr},
    {"adapter_layer", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(adapter_layer)), METH_FASTCALL, nullptr},
    {"adapter_on_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(adapter_on_linear)), METH_FASTCALL,
     nullptr},
    {"lora_on_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(lora_on_linear)), METH_FASTCALL, nullptr},
    {"lora_layer", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(lora_layer)), METH_FASTCALL, nullptr},
    {"places", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(places)), METH_FASTCALL, nullptr},
    {"split", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(split)), METH_FASTCALL, nullptr},
    {"merge_banks", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(merge_banks)), METH_FASTCALL, nullptr},
    {"keep_plan", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(keep_plan)), METH_FASTCALL, nullptr},
    {"serve", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(serve)), METH_FASTCALL, nullptr},
    {"forget", forget, METH_NOARGS, nullptr},
    {"setup", setup, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_node", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace adamix

// The build's word for what this was compiled from (_build/node.py).
#if !defined(ADAMIX_NODE_SOURCES)
#define ADAMIX_NODE_SOURCES ""
#endif

PyMODINIT_FUNC PyInit__node() {
  PyObject* module = PyModule_Create(&adamix::definition);
  if (module != nullptr && PyModule_AddStringConstant(module, "sources", ADAMIX_NODE_SOURCES) != 0) {
    Py_CLEAR(module);
  }
  return module;
}
