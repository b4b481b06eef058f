// Single values whose dtype is only known at run time: scores, counts, factors.
#pragma once

#include "common/dtype.h"

namespace adamix {

enum class Kind : unsigned char { kNone, kFloat, kHalf, kBFloat16, kDouble, kInt, kLong };

// data[at] as a float or a double; 0 where there is no data.
template <typename Wide>
ADAMIX_DEVICE Wide load_scalar(const void* data, Kind kind, int64_t at) {
  switch (kind) {
    case Kind::kFloat:
      return static_cast<Wide>(static_cast<const float*>(data)[at]);
    case Kind::kHalf:
      return static_cast<Wide>(to_float(static_cast<const half*>(data)[at]));
    case Kind::kBFloat16:
      return static_cast<Wide>(to_float(static_cast<const bfloat16*>(data)[at]));
    case Kind::kDouble:
      return static_cast<Wide>(static_cast<const double*>(data)[at]);
    case Kind::kInt:
      return static_cast<Wide>(static_cast<const int32_t*>(data)[at]);
    case Kind::kLong:
      return static_cast<Wide>(static_cast<const int64_t*>(data)[at]);
    case Kind::kNone:
      break;
  }
  return Wide(0);
}

// data[at] = value, for the floating kinds.
template <typename Wide>
ADAMIX_DEVICE void store_scalar(void* data, Kind kind, int64_t at, Wide value) {
  if (kind == Kind::kFloat) static_cast<float*>(data)[at] = static_cast<float>(value);
  if (kind == Kind::kHalf) static_cast<half*>(data)[at] = from_float<half>(static_cast<float>(value));
  if (kind == Kind::kBFloat16) static_cast<bfloat16*>(data)[at] = from_float<bfloat16>(static_cast<float>(value));
  if (kind == Kind::kDouble) static_cast<double*>(data)[at] = static_cast<double>(value);
}

}  // namespace adamix
