#include "autograd/modules.h"

#include <array>

#include "autograd/served.h"

namespace adamix {
namespace {

struct ModulesNames {
  PyObject *forward = interned("forward"), *call = interned("_call_impl"), *compiled = interned("_compiled_call_impl");
  std::array<PyObject*, 4> hooks = {interned("_forward_hooks"), interned("_backward_hooks"),
                                    interned("_backward_pre_hooks"), interned("_forward_pre_hooks")};
  std::array<PyObject*, 4> global_hooks = {interned("_global_forward_hooks"), interned("_global_backward_hooks"),
                                           interned("_global_backward_pre_hooks"),
                                           interned("_global_forward_pre_hooks")};
};

const ModulesNames& modules_names() {
  static const ModulesNames made;
  return made;
}

bool is_there(PyObject* owner, PyObject* name, PyObject* wanted) {
  if (PyDict_CheckExact(owner)) return PyDict_GetItem(owner, name) == wanted;
  PyObject* found = PyObject_GetAttr(owner, name);
  PyErr_Clear();
  Py_XDECREF(found);
  return found == wanted;
}

}  // namespace

PyObject* known_class(PyObject* known, PyObject* module) {
  return PyDict_GetItem(known, reinterpret_cast<PyObject*>(Py_TYPE(module)));
}

bool has_no_hooks(const Attributes& own, size_t count) {
  for (size_t n = 0; n < count; ++n) {
    if (own.has_entries(modules_names().hooks[n])) return false;
    PyObject* found = PyDict_GetItem(python.modules, modules_names().global_hooks[n]);
    if (found == nullptr || !PyDict_Check(found) || PyDict_GET_SIZE(found) > 0) return false;
  }
  return true;
}

bool is_as_written(const Attributes& own, PyObject* called, std::initializer_list<PyObject*> others) {
  for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(called); ++n) {
    PyObject* part = PyTuple_GET_ITEM(called, n);
    if (!is_there(PyTuple_GET_ITEM(part, 0), PyTuple_GET_ITEM(part, 1), PyTuple_GET_ITEM(part, 2))) return false;
  }
  for (PyObject* name : {modules_names().forward, modules_names().call}) {
    if (own.get(name) != nullptr) return false;
  }
  for (PyObject* name : others) {
    if (own.get(name) != nullptr) return false;
  }
  PyObject* compiled = own.get(modules_names().compiled);
  return has_no_hooks(own, 4) && (compiled == nullptr || compiled == Py_None);
}

}  // namespace adamix
