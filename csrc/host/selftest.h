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
  kOwnLimit,
};

// out[i] = in[255 - i] for 256 floats, with one fault; the launch asks for `more_shared` bytes that it does not need.
void launch_reverse(const float* in, float* out, Fault fault, size_t more_shared, const Device& device);

}  // namespace adamix
