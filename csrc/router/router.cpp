// The router's entry from the dispatcher: checks, allocation, launch.
#include "router/router.h"

#include "common/checks.h"
#include "registration.h"

namespace adamix {

std::tuple<Tensor, Tensor, Tensor> router_forward(Tensor x, Tensor weight, OptionalTensor bias, int64_t top_k) {
  DType dtype = check_dtype("x", x);
  if (x.dim() < 1) fail("x", shape_text(x), "[..., H]");
  std::vector<int64_t> lead(x.sizes().begin(), x.sizes().end() - 1);
  int64_t features = x.size(x.dim() - 1), rows = 1;
  for (int64_t size : lead) rows *= size;
  check_sizes("weight", weight, "[M, H]", {-1, features});
  int64_t experts = weight.size(0);
  if (experts < 1 || experts > kRouterMostExperts) fail("weight", shape_text(weight), "1 <= M <= 256");
  bool wide = weight.scalar_type() == ScalarType::Float;
  if (!wide || !is_beside(weight, x)) check_like("weight", weight, "x", x);
  if (bias.has_value()) {
    check_like("bias", *bias, "weight", weight);
    check_sizes("bias", *bias, "[M]", {experts});
  }
  if (top_k < 0 || top_k >= experts) fail("top_k", std::to_string(top_k), "0 (all), or fewer than the experts");
  Device device = check_device("x", x);

  x = as_contiguous(x), weight = as_contiguous(weight);
  if (bias.has_value()) bias = as_contiguous(*bias);
  std::vector<int64_t> all = lead, chosen = lead;
  all.push_back(experts), chosen.push_back(top_k);
  Tensor logits = allocate(x, all, ScalarType::Float);
  Tensor gates = allocate(x, top_k > 0 ? chosen : all, ScalarType::Float);
  Tensor index = allocate(x, top_k > 0 ? chosen : std::vector<int64_t>{0}, ScalarType::Long);
  DeviceScope scope(device);
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Router<T> params{};
    params.x = data<const T>(x);
    params.weight = weight.data_ptr();
    params.bias = bias.has_value() ? bias->data_ptr() : nullptr;
    params.gates = data<float>(gates);
    params.index = data<int64_t>(index);
    params.logits = data<float>(logits);
    params.rows = check_int("x", rows);
    params.features = check_int("x", features);
    params.experts = static_cast<int>(experts);
    params.top_k = static_cast<int>(top_k);
    params.wide = wide;
    params.aligned = is_aligned(params.x, {features}, sizeof(T)) && is_aligned(params.weight, {features}, sizeof(T));
    launch_router(params, device);
  });
  return {gates, index, logits};
}

}  // namespace adamix
