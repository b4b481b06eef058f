// The means of a list of banks: the library's launch of them, and their places in one allocation, without Python.
#pragma once

#include <Python.h>

namespace adamix {

// places(shapes, offsets, elements): where results lie in an allocation of `elements`, for the two below to read.
//
// split(places, memory): the results in memory, one axis; merge_banks(places, banks, scores): the library's kernels'
// means of contiguous banks with scores of float32 or None, in new memory. To autograd each result is a tensor of its
// own. None where Python's way must be taken.
PyObject* places(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* split(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* merge_banks(PyObject*, PyObject* const* given, Py_ssize_t count);

}  // namespace adamix
