// Looks into Python objects: attributes of modules and of routers, items of dictionaries.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include "autograd/served.h"

namespace adamix {

// An object's own attributes, without those of its class.
class Attributes {
 public:
  explicit Attributes(PyObject* object) : dict_(PyObject_GenericGetDict(object, nullptr)) { PyErr_Clear(); }
  ~Attributes() { Py_XDECREF(dict_); }
  Attributes(const Attributes&) = delete;
  Attributes& operator=(const Attributes&) = delete;

  // Borrowed; null where there is none.
  PyObject* get(PyObject* name) const { return dict_ == nullptr ? nullptr : PyDict_GetItem(dict_, name); }
  bool has(PyObject* name, PyObject* value) const { return get(name) == value; }
  bool has_entries(PyObject* name) const {
    PyObject* found = get(name);
    return found == nullptr || !PyDict_Check(found) || PyDict_GET_SIZE(found) > 0;
  }
  template <typename T>
  bool read_into(PyObject* name, T& value) const {
    PyObject* found = get(name);
    return found != nullptr && read(found, value);
  }

 private:
  PyObject* dict_;
};

inline bool read_item(PyObject* dict, PyObject* name, at::Tensor& t) {
  PyObject* found = PyDict_GetItem(dict, name);
  return found != nullptr && read(found, t) && t.defined();
}

}  // namespace adamix
