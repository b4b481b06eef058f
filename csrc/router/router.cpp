// The router's entry from the dispatcher: checks, allocation, launch.
#include "router/router.h"

#include "registration.h"
#include "router/router_call.h"

namespace adamix {

RouterCall::RouterCall(const char* name, const Tensor& of_x, const Tensor& of_weight, const OptionalTensor& of_bias,
                       int64_t of_top_k)
    : dtype(check_dtype("x", of_x)), x(of_x), weight(of_weight), bias(of_bias) {
  if (x.dim() < 1) fail("x", shape_text(x), "[..., H]");
  std::vector<int64_t> lead(x.sizes().begin(), x.sizes().end() - 1);
  int64_t width = x.size(x.dim() - 1), all_rows = 1;
  for (int64_t size : lead) all_rows *= size;
  check_sizes(name, weight, "[M, H]", {-1, width});
  int64_t all = weight.size(0);
  if (all < 1 || all > kRouterMostExperts) fail(name, shape_text(weight), "1 <= M <= 256");
  wide = weight.scalar_type() == ScalarType::Float;
  if (!wide || !is_beside(weight, x)) check_like(name, weight, "x", x);
  if (bias.has_value()) {
    check_like("bias", *bias, name, weight);
    check_sizes("bias", *bias, "[M]", {all});
  }
  if (of_top_k < 0 || of_top_k >= all) fail("top_k", std::to_string(of_top_k), "0 (all), or fewer than the experts");
  rows = check_int("x", all_rows), features = check_int("x", width);
  experts = static_cast<int>(all), top_k = static_cast<int>(of_top_k);
  std::vector<int64_t> every = lead, chosen = lead;
  every.push_back(all), chosen.push_back(of_top_k);
  logits = allocate(x, every, ScalarType::Float);
  gates = allocate(x, top_k > 0 ? chosen : every, ScalarType::Float);
  index = allocate(x, top_k > 0 ? chosen : std::vector<int64_t>{0}, ScalarType::Long);
}

void RouterCall::run(const Device& device) {
  x = as_contiguous(x), weight = as_contiguous(weight);
  if (bias.has_value()) bias = as_contiguous(*bias);
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Router<T> params{};
    params.x = data<const T>(x);
    params.weight = weight.data_ptr();
    params.bias = bias.has_value() ? bias->data_ptr() : nullptr;
    params.gates = data<float>(gates);
    params.index = data<int64_t>(index);
    params.logits = data<float>(logits);
    params.rows = rows, params.features = features, params.experts = experts, params.top_k = top_k;
    params.wide = wide;
    params.aligned = is_aligned(params.x, {features}, sizeof(T)) && is_aligned(params.weight, {features}, sizeof(T));
    launch_router(params, device);
  });
}

std::tuple<Tensor, Tensor, Tensor> router_forward(Tensor x, Tensor weight, OptionalTensor bias, int64_t top_k) {
  RouterCall call("weight", x, weight, bias, top_k);
  Device device = check_device("x", x);
  DeviceScope scope(device);
  call.run(device);
  return {call.gates, call.index, call.logits};
}

}  // namespace adamix
