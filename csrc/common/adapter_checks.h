// Checks of what the adapter's ops have in common.
#pragma once

#include "common/activation.h"
#include "common/checks.h"

namespace adamix {

inline Activation activation_of(const std::string& name) {
  if (name.empty()) return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  fail("activation", "'" + name + "'", "'gelu', 'gelu_tanh', 'relu', 'silu' or ''");
}

inline void check_bias(const char* name, const OptionalTensor& bias, const char* layout, int64_t experts,
                       int64_t features, const Tensor& x) {
  if (!bias.has_value()) return;
  check_like(name, *bias, "x", x);
  check_sizes(name, *bias, layout, {experts, features});
}

inline OptionalTensor contiguous_or_none(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
}

}  // namespace adamix
