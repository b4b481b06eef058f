// Run-time dtypes of single values, as common/scalar.h reads them.
#pragma once

#include "common/checks.h"
#include "common/scalar.h"

namespace adamix {

// How the device reads `tensor`; throws, naming it, for a dtype it cannot read. integers: whether those are welcome.
inline Kind check_kind(const char* name, const Tensor& tensor, bool integers = false) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Kind::kFloat;
    case ScalarType::Half:
      return Kind::kHalf;
    case ScalarType::BFloat16:
      return Kind::kBFloat16;
    case ScalarType::Double:
      return Kind::kDouble;
    case ScalarType::Int:
      if (integers) return Kind::kInt;
      break;
    case ScalarType::Long:
      if (integers) return Kind::kLong;
      break;
    default:
      break;
  }
  fail(name, torch::headeronly::toString(tensor.scalar_type()),
       std::string("Float, Half, BFloat16 or Double") + (integers ? ", or Int or Long" : ""));
}

inline void check_same_device(const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  if (!is_beside(tensor, like)) fail(name, "another device", std::string("the device of ") + like_name);
}

}  // namespace adamix
