#include "autograd/plan.h"

#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>

#include "autograd/served.h"

namespace adamix {
namespace {

template <typename T>
std::vector<T> read_numbers(PyObject* given) {
  std::vector<int64_t> numbers;
  TORCH_CHECK(read(given, numbers), "keep_plan: expected a tuple of ints");
  return {numbers.begin(), numbers.end()};
}

}  // namespace

void raise() {
  python_error error;
  error.persist();
  throw std::move(error);
}

std::shared_ptr<Plan> read_plan(PyObject* described) {
  PyObject *results, *offsets, *parts, *constants, *launches;
  long long device = 0, scratch = 0;
  auto made_plan = std::make_shared<Plan>();
  Plan& plan = *made_plan;
  if (!PyArg_ParseTuple(described, "LOLOOOO", &device, &results, &scratch, &offsets, &parts, &constants, &launches)) {
    raise();
  }
  plan.device = device, plan.scratch = scratch, plan.offsets = read_numbers<int64_t>(offsets);
  each(results, [&](PyObject* item) {
    PyObject *sizes, *dtype;
    if (!PyArg_ParseTuple(item, "OO!", &sizes, &THPDtypeType, &dtype)) raise();
    plan.results.push_back({read_numbers<int64_t>(sizes), reinterpret_cast<THPDtype*>(dtype)->scalar_type});
  });
  each(parts, [&](PyObject* item) {
    auto numbers = read_numbers<int64_t>(item);
    plan.parts.emplace_back(numbers.at(0), numbers.at(1));
  });
  each(constants, [&](PyObject* item) { plan.constants.push_back(PyLong_AsUnsignedLongLongMask(item)); });
  each(launches, [&](PyObject* item) {
    unsigned long long function = 0;
    PlannedLaunch made{};
    driver::Launch& launch = made.launch;
    PyObject* parameters;
    if (!PyArg_ParseTuple(item, "K(III)IIO", &function, &launch.grid[0], &launch.grid[1], &launch.grid[2],
                          &launch.threads, &launch.shared, &parameters)) {
      raise();
    }
    launch.function = reinterpret_cast<void*>(function);
    made.parameters = read_numbers<size_t>(parameters);
    plan.launches.push_back(std::move(made));
  });
  return made_plan;
}

}  // namespace adamix
