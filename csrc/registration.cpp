// The library adamix_cuda: what adamix_kernels/ops/<op>/cuda_impl.py calls.
//
// Every op is registered for all devices, so that the C++ checks see every tensor and can name what is wrong.
#include "registration.h"

namespace adamix {

#if !defined(ADAMIX_ARCHITECTURES)
#define ADAMIX_ARCHITECTURES ""
#endif

// What this shared object holds: "host" for the CPU build of the device code, else the architectures.
std::string build_info() {
#if defined(ADAMIX_HOST)
  return "host";
#else
  return ADAMIX_ARCHITECTURES;
#endif
}

}  // namespace adamix

STABLE_TORCH_LIBRARY(adamix_cuda, m) {
  m.def("build_info() -> str");
  m.def(
      "routed_adapter_forward(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
      "Tensor? down_index, Tensor? up_index, Tensor? residual, bool add_input, str activation) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(adamix_cuda, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&adamix::build_info));
  m.impl("routed_adapter_forward", TORCH_BOX(&adamix::routed_adapter_forward));
}
