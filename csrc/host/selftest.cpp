#include "host/selftest.h"

#include "common/checks.h"

namespace adamix {

Tensor host_selftest(Tensor in, int64_t fault, int64_t more_shared) {
  check_sizes("in", in, "[256]", {256});
  if (check_dtype("in", in) != DType::kFloat) fail("in", "another dtype", "Float");
  Device device = check_device("in", in);
  in = as_contiguous(in);
  Tensor out = allocate(in, {256});
  launch_reverse(data<const float>(in), data<float>(out), static_cast<Fault>(fault),
                 check_int("more_shared", more_shared), device);
  return out;
}

}  // namespace adamix

STABLE_TORCH_LIBRARY_FRAGMENT(adamix_cuda, m) {
  m.def("host_selftest(Tensor input, int fault, int more_shared) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(adamix_cuda, CompositeExplicitAutograd, m) {
  m.impl("host_selftest", TORCH_BOX(&adamix::host_selftest));
}
