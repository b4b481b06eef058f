// A routed module's call in training, from its attributes: what its forward in Python does where nothing is unusual.
#pragma once

#include <Python.h>

namespace adamix {

// lora_layer(module, x, base), adapter_layer(module, x, residual): the output, or None where Python's way must be
// taken. module: a RoutedLoRALinear, whose base layer gave `base` for x; a RoutedAdapter.
//
// lora_on_linear(module, x), adapter_on_linear(module, x): with the base layer's output computed here, where that is a
// frozen linear layer; what the base layer gave alone, in a tuple, where only that was done. The latter's module is an
// AdaptedLayer.
PyObject* lora_on_linear(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* lora_layer(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* adapter_on_linear(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* adapter_layer(PyObject*, PyObject* const* given, Py_ssize_t count);

}  // namespace adamix
