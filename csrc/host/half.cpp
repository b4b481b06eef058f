// fp16 and bf16 on the CPU, rounded to nearest even; the conversions are PyTorch's own.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "host/cuda.h"

namespace adamix::host {

float widen(half v) { return static_cast<float>(c10::Half(v.bits, c10::Half::from_bits())); }

float widen(bfloat16 v) { return static_cast<float>(c10::BFloat16(v.bits, c10::BFloat16::from_bits())); }

template <>
half narrow<half>(float v) {
  return {c10::Half(v).x};
}

template <>
bfloat16 narrow<bfloat16>(float v) {
  return {c10::BFloat16(v).x};
}

}  // namespace adamix::host
