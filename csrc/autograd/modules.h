// Modules whose call does what their class says: nobody patched it, and nothing hangs on it.
#pragma once

#include <Python.h>

#include <cstddef>
#include <initializer_list>

#include "autograd/attributes.h"

namespace adamix {

// What Python kept of the module's class in `known`; null where there is nothing.
PyObject* known_class(PyObject* known, PyObject* module);

// Whether nobody hangs on the first `count` kinds of hooks: those that see the module's output or its backward, then,
// as the fourth, those that may change what it is given.
bool has_no_hooks(const Attributes& own, size_t count);

// Whether the module's call runs what `called`, ((a class or a namespace, a name, what was there), ...), says, with no
// hook, nothing compiled and nothing of `names` in the class's or the parameters' place.
bool is_as_written(const Attributes& own, PyObject* called, std::initializer_list<PyObject*> names);

}  // namespace adamix
