// Frozen linear layers that are what their class says: their output and its derivative, without Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

namespace adamix {

// weight [N, K], or [K, N] if transposed (transformers' Conv1D); bias [N] or undefined.
struct FrozenLinear {
  at::Tensor weight, bias;
  bool transposed = false;
};

// Whether a module is of a class in ops/_node.py's LINEARS, with the forward that it had then, and nobody is told of
// its output: it is new memory that no backward needs.
bool is_plain_linear(PyObject* module);

// Whether such a module, called with x [B, S, K], does no more than `linear_output`; what it computes with.
bool read_frozen_linear(PyObject* module, const at::Tensor& x, FrozenLinear& linear);

// x [B, S, K] -> [B, S, N], by the ops of the module's forward, below autograd.
at::Tensor linear_output(const FrozenLinear& linear, const at::Tensor& x);

// The derivative by x, in new memory, for a gradient of linear_output, below autograd.
at::Tensor linear_input_grad(const at::Tensor& grad_out, const at::Tensor& weight, bool transposed);

// `out` becomes what autograd records of linear_output.
void record_linear(const FrozenLinear& linear, const at::Tensor& x, const at::Tensor& out);

}  // namespace adamix
