// The functions behind the dispatcher's ops, one line for each; registration.cpp has their schemas.
#pragma once

#include "common/checks.h"

namespace adamix {

std::tuple<Tensor, Tensor> routed_adapter_forward(Tensor x, Tensor down_weight, OptionalTensor down_bias,
                                                  Tensor up_weight, OptionalTensor up_bias, OptionalTensor down_index,
                                                  OptionalTensor up_index, OptionalTensor residual, bool add_input,
                                                  std::string activation);

}  // namespace adamix
