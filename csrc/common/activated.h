// An activation and its derivative at once, in fp32.
#pragma once

#include "common/activation.h"

namespace adamix {

struct Activated {
  float value, slope;
};

// activate(kind, z) and activation_slope(kind, z); GELU's share their error function.
ADAMIX_DEVICE Activated activated(Activation kind, float z) {
  if (kind == Activation::kGelu) {
    float twice = 1.f + erff(z * kSqrtHalf);
    return {0.5f * z * twice, 0.5f * twice + z * kInvSqrt2Pi * expf(-0.5f * z * z)};
  }
  return {activate(kind, z), activation_slope(kind, z)};
}

}  // namespace adamix
