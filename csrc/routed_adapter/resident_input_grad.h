// The input's gradient on tiles that stay in registers (resident_bwd.h), of the adapter and of LoRA.
#pragma once

#include "routed_adapter/routed_adapter.h"

namespace adamix {

// The adapter's own call has a scaling of 1. Without an activation pre may be null.
template <typename T>
struct ResidentInputGrad : RoutedAdapterInputGrad<T> {
  float scaling;  // of grad_out Wu
};

#if defined(ADAMIX_LAUNCHERS)
// half and bfloat16 alone. Launches nothing and returns false where no such tile serves: rows are no 16-byte pieces,
// Hout is not H, or the GPU has no such products in registers.
template <typename T>
bool launch_resident_input_grad(const ResidentInputGrad<T>& params, const Device& device);
#endif

}  // namespace adamix
