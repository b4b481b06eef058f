// A call of the router, checked, with memory for what it gives.
#pragma once

#include "common/checks.h"

namespace adamix {

struct RouterCall {
  DType dtype;
  int rows, features, experts, top_k;
  bool wide;  // weight and bias are float32, whatever x is
  Tensor x, weight;
  OptionalTensor bias;
  Tensor gates, index, logits;

  // x [..., H]; weight [M, H], as messages call it `name`; bias [M]; top_k: 0 for all.
  RouterCall(const char* name, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t top_k);
  // Fills gates, index and logits; the device is current.
  void run(const Device& device);
};

}  // namespace adamix
