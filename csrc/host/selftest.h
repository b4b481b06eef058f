#pragma once

#include "common/launch.h"

namespace adamix {

enum class Fault : int {
  kNone,
  kNoBarrier,
  kNoWait,
  kSharedBounds,
  kGlobalBounds,
  kUninitialised,
  kDivergentBarrier,
  kSharedLimit,
};

// out[i] = in[255 - i] for 256 floats, with one fault.
void launch_reverse(const float* in, float* out, Fault fault, const Device& device);

}  // namespace adamix
