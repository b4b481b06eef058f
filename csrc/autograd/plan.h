// What a plan (plans.h) holds, and how it is read from what Python says of it.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "autograd/driver.h"

namespace adamix {

struct PlannedLaunch {
  driver::Launch launch;
  std::vector<size_t> parameters;  // numbers of values
};

struct Result {
  std::vector<int64_t> sizes;
  at::ScalarType dtype;
};

// The values of a call: addresses of its tensors, of the results, of parts of the scratch memory and of other values,
// then constants as the kernels take them.
struct Plan {
  int64_t device;
  std::vector<Result> results;
  int64_t scratch;  // elements of the first tensor's dtype
  std::vector<int64_t> offsets;
  std::vector<std::pair<size_t, int64_t>> parts;
  std::vector<uint64_t> constants;
  std::vector<PlannedLaunch> launches;
  PyObject* source = nullptr;  // holds the kernels

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() { Py_XDECREF(source); }
};

template <typename F>
void each(PyObject* items, F take) {
  TORCH_CHECK(PyTuple_CheckExact(items) || PyList_CheckExact(items), "keep_plan: expected a tuple or a list");
  for (Py_ssize_t n = 0; n < PySequence_Fast_GET_SIZE(items); ++n) take(PySequence_Fast_GET_ITEM(items, n));
}

// Python's error as C++'s, which other threads may hand on.
[[noreturn]] void raise();

// What Plan.described gives.
std::shared_ptr<Plan> read_plan(PyObject* described);

}  // namespace adamix
