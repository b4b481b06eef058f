// Calls whose launches of Triton's compiled kernels Python recorded (ops/_triton_plans.py): the same launches again.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <Python.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace adamix {

enum class PlanKind : char { kAdapter, kAdapterBackward, kLora, kLoraInPlace, kLoraBackward };

// A call's tensors, undefined where there is none, and everything else that a plan depends on.
class Request {
 public:
  Request(PlanKind kind, std::vector<at::Tensor> tensors);
  void put(bool flag);
  void put(int64_t number);
  void put(double number);
  void put(const std::string& text);
  void put(c10::IntArrayRef numbers);

  const std::vector<at::Tensor>& tensors() const { return tensors_; }
  const std::string& key() const { return key_; }
  // Whether every tensor is plain (served.h), contiguous and at a multiple of 16, as plans want them.
  bool fits() const { return fits_; }

 private:
  void put_bytes(const void* bytes, size_t count) { key_.append(static_cast<const char*>(bytes), count); }

  std::vector<at::Tensor> tensors_;
  std::string key_;
  bool fits_ = true;
};

// Under the GIL: the results of the plan's launches, of which those of one axis of length 0 are undefined; nothing
// where no plan is known, or where another device is current or Triton's own hooks watch launches.
std::optional<std::vector<at::Tensor>> launch_plan(Request& request);

// Without the GIL: a backward's arguments in the order of its schema become its results, of a plan or, where there is
// none yet and where something watches, of Python's backward, which keeps the plan that it makes.
void run_planned_backward(PlanKind kind, std::vector<c10::IValue>& arguments, int64_t passes,
                          const std::string& backend);

// keep_plan(kind, tensors, options, plan): Python's Plan serves such calls until `forget_plans`, if it can be launched
// from here, and plan.kept is set, so that it is not offered again. Not where it does not fit the tensors. Where there
// are too many, all others are forgotten first, and theirs is unset.
PyObject* keep_plan(PyObject*, PyObject* const* given, Py_ssize_t count);
void forget_plans();

}  // namespace adamix
