// The routed adapter's entries from the dispatcher: checks, allocation, launch.
#include "routed_adapter/routed_adapter.h"

#include "common/adapter_checks.h"
#include "common/checks.h"
#include "common/held_pass_plan.h"
#include "common/joined_blocks.h"
#include "common/row_shares.h"
#include "common/sample_grads_plan.h"
#include "registration.h"

namespace adamix {
namespace {

// The backward in one pass, where held_pass_plan has one and all lies at multiples of 16 bytes; whether it was
// launched.
bool launch_in_one_pass(DType dtype, const Tensor& grad_out, const Tensor& x, const Tensor& pre,
                        const Tensor& down_weight, const Tensor& up_weight, const Routing& down, const Routing& up,
                        const Tensor& dx, const Tensor& ddown_weight, const Tensor& ddown_bias,
                        const Tensor& dup_weight, const Tensor& dup_bias, bool need_input, bool need_down, bool need_up,
                        bool add_input, Activation activation, const Device& device) {
  bool launched = false;
  if (x.size(2) != grad_out.size(2) || !(need_down || need_up)) return false;
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (kFragmentsFrom<T> > 0) {
      int64_t hidden = x.size(2), rank = pre.size(2);
      OnePass<T> params{};
      params.grad_out = rows_of<const T>(grad_out);
      params.x = rows_of<const T>(x);
      params.narrow = data<const T>(pre);
      params.down_weight = data<const T>(down_weight);
      params.up_weight = data<const T>(up_weight);
      params.dx = need_input ? data<T>(dx) : nullptr;
      PassPlan plan = held_pass_plan<T>(x.size(0), x.size(1), hidden, rank, down, up, true, device);
      limit_cluster(plan, down, up);
      if (plan.blocks == 0 || !params.grad_out.aligned || !params.x.aligned ||
          !is_aligned(params.narrow, {}, sizeof(T)) || !is_aligned(params.down_weight, {hidden}, sizeof(T)) ||
          !is_aligned(params.up_weight, {}, sizeof(T)) || !is_aligned(params.dx, {hidden}, sizeof(T))) {
        return;
      }
      Tensor planes = allocate(x, {plan.floats()}, ScalarType::Float);
      PassSum<T> sum{};
      follow(plan, data<float>(planes), x.size(1), hidden, rank, params, sum);
      params.down = down;
      params.up = up;
      params.activation = activation;
      params.add_input = add_input, params.need_down = need_down, params.need_up = need_up;
      if constexpr (kIsHalf<T>) {
        if (holds_pass<T>(device)) launch_held_pass<false>(params, plan, device);
      }
      if (!holds_pass<T>(device)) launch_routed_adapter_one_pass(params, plan, device);
      sum.down_weight = data<T>(ddown_weight), sum.down_bias = data<T>(ddown_bias);
      sum.up_weight = data<T>(dup_weight), sum.up_bias = data<T>(dup_bias);
      launch_routed_adapter_pass_sum(sum, need_down ? static_cast<int>(down_weight.size(0)) : 0,
                                     need_up ? static_cast<int>(up_weight.size(0)) : 0, device);
      launched = true;
    }
  });
  return launched;
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
  int64_t rows = check_int("B * S", batch * tokens);
  Device device = check_device("x", x);

  x = with_contiguous_rows(x);
  OptionalTensor added = add_input ? OptionalTensor(x) : residual;
  if (added.has_value()) added = with_contiguous_rows(*added);
  // The kernels take rows that begin where those of x do for x itself.
  if (added.has_value() && added->data_ptr() == x.data_ptr() &&
      (added->stride(0) != x.stride(0) || added->stride(1) != x.stride(1))) {
    x = as_contiguous(x), added = as_contiguous(*added);
  }
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
    params.rows = rows;
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routed_adapter_backward(
    Tensor grad_out, Tensor x, Tensor pre, Tensor down_weight, Tensor up_weight, OptionalTensor down_index,
    OptionalTensor up_index, bool need_input, bool need_down, bool need_up, bool add_input, std::string activation) {
  DType dtype = check_dtype("x", x);
  check_sizes("x", x, "[B, S, H]", {-1, -1, -1});
  int64_t batch = x.size(0), tokens = x.size(1), hidden = x.size(2);
  check_like("down_weight", down_weight, "x", x);
  check_sizes("down_weight", down_weight, "[Md, r, H]", {-1, -1, hidden});
  int64_t down_experts = down_weight.size(0), rank = down_weight.size(1);
  check_like("up_weight", up_weight, "x", x);
  check_sizes("up_weight", up_weight, "[Mu, Hout, r]", {-1, -1, rank});
  int64_t up_experts = up_weight.size(0), out_features = up_weight.size(1);
  check_like("grad_out", grad_out, "x", x);
  check_sizes("grad_out", grad_out, "[B, S, Hout]", {batch, tokens, out_features});
  check_like("pre", pre, "x", x);
  check_sizes("pre", pre, "[B, S, r]", {batch, tokens, rank});
  if (add_input) check_sizes("x as the residual", x, "[B, S, Hout]", {batch, tokens, out_features});
  std::vector<Tensor> kept;
  Routing down = check_routing("down_index", down_index, batch, tokens, down_experts, x, kept);
  Routing up = check_routing("up_index", up_index, batch, tokens, up_experts, x, kept);
  Activation kind = activation_of(activation);
  int64_t rows = check_int("B * S", batch * tokens);
  check_int("H", hidden), check_int("r", rank), check_int("Hout", out_features);
  Device device = check_device("x", x);

  auto gradient = [&](bool needed, const std::vector<int64_t>& sizes) {
    return allocate(x, needed ? sizes : std::vector<int64_t>{0});
  };
  Tensor dx = gradient(need_input, {batch, tokens, hidden});
  Tensor ddown_weight = gradient(need_down, {down_experts, rank, hidden});
  Tensor ddown_bias = gradient(need_down, {down_experts, rank});
  Tensor dup_weight = gradient(need_up, {up_experts, out_features, rank});
  Tensor dup_bias = gradient(need_up, {up_experts, out_features});
  x = with_contiguous_rows(x), grad_out = with_contiguous_rows(grad_out), pre = as_contiguous(pre);
  down_weight = as_contiguous(down_weight), up_weight = as_contiguous(up_weight);
  DeviceScope scope(device);
  if (launch_in_one_pass(dtype, grad_out, x, pre, down_weight, up_weight, down, up, dx, ddown_weight, ddown_bias,
                         dup_weight, dup_bias, need_input, need_down, need_up, add_input, kind, device)) {
    return {dx, ddown_weight, ddown_bias, dup_weight, dup_bias};
  }
  // What the first launch leaves for the second: dpre for the down side, h for the up side.
  bool need_h = need_up && kind != Activation::kNone;
  int64_t narrow_size = (rows * rank + 7) / 8 * 8;
  OptionalTensor narrow, planes;
  if (need_down || need_h) narrow = allocate(x, {(need_down + need_h) * narrow_size});
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    bool rank_aligned = is_aligned(nullptr, {rank}, sizeof(T));
    PlaneSum<T> sum{};
    RoutedAdapterWeightGrad<T> weights{};
    T* dpre = need_down ? data<T>(narrow) : nullptr;
    T* h = need_h ? data<T>(narrow) + need_down * narrow_size : nullptr;
    GradSide<T>& of_down = weights.down;
    of_down.groups = 1, of_down.cols = hidden, of_down.ranks = rank;
    if (need_down) {
      of_down.wide = rows_of<const T>(x);
      of_down.narrow = dpre;
      of_down.narrow_aligned = rank_aligned && is_aligned(of_down.narrow, {}, sizeof(T));
      of_down.routing = down;
      of_down.other = up;
      of_down.weight = sum.add(data<T>(ddown_weight), ddown_weight.numel());
      of_down.bias = sum.add(data<T>(ddown_bias), ddown_bias.numel());
      of_down.bias_of = BiasOf::kNarrow;
      of_down.experts = check_int("Md", down_experts);
      of_down.ranks_first = true;
    }
    GradSide<T>& of_up = weights.up;
    of_up.groups = 1, of_up.cols = out_features, of_up.ranks = rank;
    if (need_up) {
      of_up.wide = rows_of<const T>(grad_out);
      of_up.narrow = need_h ? h : data<const T>(pre);
      of_up.narrow_aligned = rank_aligned && is_aligned(of_up.narrow, {}, sizeof(T));
      of_up.routing = up;
      of_up.other = down;
      of_up.weight = sum.add(data<T>(dup_weight), dup_weight.numel());
      of_up.bias = sum.add(data<T>(dup_bias), dup_bias.numel());
      of_up.bias_of = BiasOf::kWide;
      of_up.experts = check_int("Mu", up_experts);
    }
    SamplePlan samples{};
    if constexpr (kFragmentsFrom<T> > 0) samples = sample_plan(of_down, of_up, batch, tokens, device);
    if (samples.shares > 0) {
      planes = allocate(x, {samples.floats()}, ScalarType::Float);
    } else {
      weights.shares = share_rows(of_down, of_up, narrow_of<T>(rank), rows, sum, x, device, planes);
    }

    if (need_input || need_down || need_h) {
      RoutedAdapterInputGrad<T> params{};
      params.grad_out = rows_of<const T>(grad_out);
      params.pre = data<const T>(pre);
      params.down_weight = data<const T>(down_weight);
      params.up_weight = data<const T>(up_weight);
      params.dpre = dpre;
      params.h = h;
      params.dx = need_input ? data<T>(dx) : nullptr;
      params.down = down;
      params.up = up;
      params.rows = rows;
      params.hidden = hidden;
      params.rank = rank;
      params.out_features = out_features;
      params.activation = kind;
      params.add_input = add_input;
      params.down_aligned = is_aligned(params.down_weight, {hidden}, sizeof(T));
      params.up_aligned = rank_aligned && is_aligned(params.up_weight, {}, sizeof(T));
      params.dx_aligned = is_aligned(params.dx, {hidden}, sizeof(T));
      launch_routed_adapter_input_grad(params, device);
    }
    if constexpr (kFragmentsFrom<T> > 0) {
      if (samples.shares > 0) {
        launch_sample_grads(samples, of_down, of_up, Dropout{}, 1.f, 1.f, batch, tokens, data<float>(planes), device);
        return;
      }
    }
    if (need_down || need_up) launch_routed_adapter_weight_grad(weights, device);
    if (weights.shares.count > 1) launch_plane_sum("routed_adapter_plane_sum", sum, device);
  });
  return {dx, ddown_weight, ddown_bias, dup_weight, dup_bias};
}

}  // namespace adamix
