// The adapter's activations and their derivatives, in fp32.
#pragma once

#include "common/platform.h"

#if defined(ADAMIX_LAUNCHERS)
#include <cmath>
#endif

namespace adamix {

enum class Activation : int { kNone, kGelu, kGeluTanh, kRelu, kSilu };

constexpr float kSqrtHalf = 0.70710678118654752f;     // 1 / sqrt(2)
constexpr float kInvSqrt2Pi = 0.39894228040143268f;   // 1 / sqrt(2 pi)
constexpr float kSqrt2OverPi = 0.79788456080286536f;  // sqrt(2 / pi)
constexpr float kGeluTanhCubic = 0.044715f;

ADAMIX_DEVICE float activate(Activation kind, float z) {
  switch (kind) {
    case Activation::kGelu:
      return 0.5f * z * (1.f + erff(z * kSqrtHalf));
    case Activation::kGeluTanh:
      return 0.5f * z * (1.f + tanhf(kSqrt2OverPi * (z + kGeluTanhCubic * z * z * z)));
    case Activation::kRelu:
      return z > 0.f || z != z ? z : 0.f;
    case Activation::kSilu:
      return z / (1.f + expf(-z));
    case Activation::kNone:
      break;
  }
  return z;
}

ADAMIX_DEVICE float activation_slope(Activation kind, float z) {
  switch (kind) {
    case Activation::kGelu:
      return 0.5f * (1.f + erff(z * kSqrtHalf)) + z * kInvSqrt2Pi * expf(-0.5f * z * z);
    case Activation::kGeluTanh: {
      float inner = tanhf(kSqrt2OverPi * (z + kGeluTanhCubic * z * z * z));
      float inner_slope = kSqrt2OverPi * (1.f + 3.f * kGeluTanhCubic * z * z);
      return 0.5f * (1.f + inner) + 0.5f * z * (1.f - inner * inner) * inner_slope;
    }
    case Activation::kRelu:
      return z <= 0.f ? 0.f : 1.f;  // of NaN: 1, as PyTorch passes the gradient on
    case Activation::kSilu: {
      float s = 1.f / (1.f + expf(-z));
      return s * (1.f + z * (1.f - s));
    }
    case Activation::kNone:
      break;
  }
  return 1.f;
}

}  // namespace adamix
