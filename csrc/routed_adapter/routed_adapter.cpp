// The routed adapter's entries from the dispatcher: checks, allocation, launch.
#include "routed_adapter/routed_adapter.h"

#include "common/checks.h"
#include "registration.h"

namespace adamix {
namespace {

Activation activation_of(const std::string& name) {
  if (name.empty()) return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  fail("activation", "'" + name + "'", "'gelu', 'gelu_tanh', 'relu', 'silu' or ''");
}

void check_bias(const char* name, const OptionalTensor& bias, const char* layout, int64_t experts, int64_t features,
                const Tensor& x) {
  if (!bias.has_value()) return;
  check_like(name, *bias, "x", x);
  check_sizes(name, *bias, layout, {experts, features});
}

OptionalTensor contiguous_or_none(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
}

}  // namespace

std::tuple<Tensor, Tensor> routed_adapter_forward(Tensor x, Tensor down_weight, OptionalTensor down_bias,
                                                  Tensor up_weight, OptionalTensor up_bias, OptionalTensor down_index,
                                                  OptionalTensor up_index, OptionalTensor residual, bool add_input,
                                                  std::string activation) {
  DType dtype = check_dtype("x", x);
  check_sizes("x", x, "[B, S, H]", {-1, -1, -1});
  int64_t batch = x.size(0), tokens = x.size(1), hidden = x.size(2);
  check_like("down_weight", down_weight, "x", x);
  check_sizes("down_weight", down_weight, "[Md, r, H]", {-1, -1, hidden});
  int64_t rank = down_weight.size(1);
  check_like("up_weight", up_weight, "x", x);
  check_sizes("up_weight", up_weight, "[Mu, Hout, r]", {-1, -1, rank});
  int64_t out_features = up_weight.size(1);
  check_bias("down_bias", down_bias, "[Md, r]", down_weight.size(0), rank, x);
  check_bias("up_bias", up_bias, "[Mu, Hout]", up_weight.size(0), out_features, x);
  if (add_input) check_sizes("x as the residual", x, "[B, S, Hout]", {batch, tokens, out_features});
  if (!add_input && residual.has_value()) {
    check_like("residual", *residual, "x", x);
    check_sizes("residual", *residual, "[B, S, Hout]", {batch, tokens, out_features});
  }
  std::vector<Tensor> kept;
  Routing down = check_routing("down_index", down_index, batch, tokens, down_weight.size(0), x, kept);
  Routing up = check_routing("up_index", up_index, batch, tokens, up_weight.size(0), x, kept);
  Activation kind = activation_of(activation);
  check_int("S", tokens);
  Device device = check_device("x", x);

  x = with_contiguous_rows(x);
  OptionalTensor added = add_input ? OptionalTensor(x) : residual;
  if (added.has_value()) added = with_contiguous_rows(*added);
  down_weight = as_contiguous(down_weight), up_weight = as_contiguous(up_weight);
  down_bias = contiguous_or_none(down_bias), up_bias = contiguous_or_none(up_bias);
  Tensor out = allocate(x, {batch, tokens, out_features});
  Tensor pre = allocate(x, {batch, tokens, rank});
  DeviceScope scope(device);
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    RoutedAdapterForward<T> params{};
    params.x = rows_of<const T>(x);
    params.residual = rows_of<const T>(added);
    params.down_weight = data<const T>(down_weight);
    params.down_bias = data<const T>(down_bias);
    params.up_weight = data<const T>(up_weight);
    params.up_bias = data<const T>(up_bias);
    params.out = data<T>(out);
    params.pre = data<T>(pre);
    params.down = down;
    params.up = up;
    params.rows = batch * tokens;
    params.hidden = check_int("H", hidden);
    params.rank = check_int("r", rank);
    params.out_features = check_int("Hout", out_features);
    params.activation = kind;
    params.down_aligned = is_aligned(params.down_weight, {hidden}, sizeof(T));
    params.up_aligned = is_aligned(params.up_weight, {rank}, sizeof(T));
    params.out_aligned = is_aligned(params.out, {out_features}, sizeof(T));
    launch_routed_adapter_forward(params, device);
  });
  return {out, pre};
}

}  // namespace adamix
