// Which calls the nodes take: tensors and threads that only autograd looks at, of kinds that Python found to be served.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <cstdint>
#include <string>
#include <vector>

#include "autograd/nodes.h"

namespace adamix {

enum OpId : int64_t { kAdapter, kLora };

// What Python hands over once; borrowed for good. direct, choices, modules: dictionaries of the modules ops/_direct,
// _auto and torch.nn.modules.module. routers: the classes whose instances do what their name says; linears and
// adapters: such classes, and what modules.h and linear.cpp read of them. current_stream(device): the stream to launch
// Triton's kernels on, or None. backward(op, passes, backend, *arguments): the backward's results where no plan is
// known.
struct Python {
  PyObject *direct, *choices, *modules, *environment, *check_name, *check_value, *table_name, *routers, *linears,
      *adapters, *current_stream, *backward;
};
extern Python python;

// A string that lives for good, for a look into a dictionary.
PyObject* interned(const char* text);

// What Python gave, if it is exactly that: a tensor of no class of its own or None, an int or a float, a string, ints.
bool read(PyObject* given, at::Tensor& t);
bool read(PyObject* given, double& number);
bool read(PyObject* given, int64_t& number);
bool read(PyObject* given, std::string& text);
bool read(PyObject* given, std::vector<int64_t>& numbers);

// Whether every call must go the long way: ADAMIX_CHECK=1, or a test switched direct calls off.
bool is_switched_off();

// Whether t is undefined, or holds its values in memory of its own as its sizes and strides say: no wrapper subclass,
// no batched, negated or dual tensor.
bool is_plain(const at::Tensor& t);

// The most that kernels take, as in adamix_kernels/_limits.py: narrow columns, and LoRA's groups of them.
struct Most {
  int64_t columns, groups;
  // Each group's columns begin at a multiple of 16.
  bool take(int64_t wanted, int64_t of_groups) const {
    if (of_groups < 1 || of_groups > groups || of_groups > wanted) return false;  // the last: 16 of_groups may overflow
    int64_t unit = 16 * of_groups;
    return (wanted + unit - 1) / unit * unit <= columns;
  }
};

// What serves calls of an op like this one, as Python found (`note_served`) since the last `forget_served`; nothing
// beyond the most that it takes.
Service service_of(OpId op, const std::string& backend, const at::Tensor& x, const at::Tensor& bank, int64_t groups);
void note_served(OpId op, const std::string& backend, const at::Tensor& x, const at::Tensor& bank, const Most& most,
                 Service service);
void forget_served();

// A new reference to the output, or to None where nothing was done.
PyObject* given_back(const at::Tensor& out);

}  // namespace adamix
