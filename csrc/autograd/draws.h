// The experts that a model's forward drew for all of its layers (routing/draws.py).
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <array>

namespace adamix {

// What one layer takes of them, as Router.draw_sides gives it; what was taken goes back if it is not used.
class Draws {
 public:
  Draws() = default;
  ~Draws();
  Draws(const Draws&) = delete;

  // x [B, S, K]. False where the router has to be asked. A bank of one leaves its index as it is.
  bool take(PyObject* router, const at::Tensor& x, std::array<int64_t, 2> experts, std::array<at::Tensor*, 2> index,
            int64_t& passes);
  // It is used.
  void keep();

 private:
  bool pop(PyObject* left, at::Tensor& index);

  std::array<PyObject*, 2> from_{}, taken_{};
  size_t count_ = 0;
};

}  // namespace adamix
