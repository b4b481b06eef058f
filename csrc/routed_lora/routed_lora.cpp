// Routed LoRA's entries from the dispatcher: checks, allocation, launch.
#include "routed_lora/routed_lora.h"

#include <algorithm>

#include "common/checks.h"
#include "common/fragment_shape.h"
#include "common/held_pass_plan.h"
#include "common/joined_blocks.h"
#include "common/lora_checks.h"
#include "common/row_shares.h"
#include "common/sample_grads_plan.h"
#include "registration.h"
#include "routed_lora/routed_lora_pass.h"

namespace adamix {
namespace {

// What forward and backward have in common, checked.
struct Call {
  DType dtype;
  int64_t batch, tokens, rows, features, experts_a, experts_b, rank, ranks;
  int width;  // columns of base, or of the gradient
  ColumnRanges ranges;
  Routing a, b;
  Dropout dropout;
  float scaling;
  std::vector<Tensor> kept;
};

// rows_like: base or the gradient [B, S, N], named rows_name; none: as many columns as the groups reach.
Call check_call(const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& a_index,
                const OptionalTensor& b_index, const char* rows_name, const OptionalTensor& rows_like,
                const OptionalTensor& seed, double scaling, int64_t groups, const std::vector<int64_t>& offsets,
                double dropout_p) {
  Call call{};
  call.dtype = check_dtype("x", x);
  check_sizes("x", x, "[B, S, K]", {-1, -1, -1});
  call.batch = x.size(0), call.tokens = x.size(1), call.features = x.size(2);
  call.rows = check_int("B * S", call.batch * call.tokens);
  check_int("S", call.tokens), check_int("K", call.features);
  if (groups < 1 || groups > kMaxGroups) {
    fail("groups", std::to_string(groups), "1 to " + std::to_string(kMaxGroups) + " groups");
  }
  check_like("lora_a", lora_a, "x", x);
  check_sizes("lora_a", lora_a, "[Ma, groups * r, K]", {-1, -1, call.features});
  call.experts_a = check_int("Ma", lora_a.size(0)), call.ranks = check_int("groups * r", lora_a.size(1));
  if (call.ranks % groups != 0) {
    fail("lora_a", shape_text(lora_a), "rows that " + std::to_string(groups) + " groups divide");
  }
  call.rank = call.ranks / groups;
  check_like("lora_b", lora_b, "x", x);
  check_sizes("lora_b", lora_b, "[Mb, groups * Ng, r]", {-1, -1, call.rank});
  call.experts_b = check_int("Mb", lora_b.size(0));
  if (lora_b.size(1) % groups != 0) {
    fail("lora_b", shape_text(lora_b), "rows that " + std::to_string(groups) + " groups divide");
  }
  if (rows_like.has_value()) {
    check_like(rows_name, *rows_like, "x", x);
    check_sizes(rows_name, *rows_like, "[B, S, N]", {call.batch, call.tokens, -1});
  }
  int64_t cols = lora_b.size(1) / groups;
  call.ranges = check_ranges(offsets, groups, cols, rows_like.has_value() ? rows_like->size(2) : -1);
  call.width = static_cast<int>(rows_like.has_value() ? rows_like->size(2)
                                                      : *std::max_element(offsets.begin(), offsets.end()) + cols);
  call.a = check_routing("a_index", a_index, call.batch, call.tokens, call.experts_a, x, call.kept);
  call.b = check_routing("b_index", b_index, call.batch, call.tokens, call.experts_b, x, call.kept);
  call.dropout = check_dropout(seed, dropout_p, x);
  call.scaling = static_cast<float>(scaling);
  return call;
}

// What the forward and the input's gradient both know of a call; the factors are contiguous.
template <typename T, typename Params>
void fill(Params& params, const Call& call, const Tensor& lora_a, const Tensor& lora_b) {
  params.lora_a = data<const T>(lora_a);
  params.lora_b = data<const T>(lora_b);
  params.a = call.a;
  params.b = call.b;
  params.ranges = call.ranges;
  params.dropout = call.dropout;
  params.rows = call.rows;
  params.features = call.features;
  params.rank = call.rank;
  params.scaling = call.scaling;
  params.a_aligned = is_aligned(params.lora_a, {call.features}, sizeof(T));
  params.b_aligned = is_aligned(params.lora_b, {call.rank}, sizeof(T));
}

// RoutedLoraWeightGrad::tiles, for a backward whose sides are complete.
template <typename T>
int count_tiles_of_ranks(const RoutedLoraWeightGrad<T>& weights, const Device& device) {
  if constexpr (sizeof(T) != 2) return 0;
  int tiles = 0;
  for (const GradSide<T>* side : {&weights.a, &weights.b}) {
    if (side->experts == 0) continue;
    bool pieces = side->wide.aligned && side->cols % 8 == 0 && side->ranks % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(side->narrow) % 8 == 0;
    if (!pieces) return 0;
    tiles = std::max(tiles, ceil_div(side->ranks, 16));
  }
  for (int group = 0; group < weights.ranges.groups && weights.b.experts > 0; ++group) {
    if (weights.ranges.start[group] % 8 != 0) return 0;
  }
  return device.capability >= kFragmentsFrom<T> && tiles <= 4 ? tiles : 0;
}

// Shares that fill the device once where each block takes half a multiprocessor's registers; planes cost at most a
// quarter of what they sum, as in count_shares.
template <typename T>
int count_lora_shares(const RoutedLoraWeightGrad<T>& weights, int64_t rows, int64_t plane_size, const Device& device) {
  int64_t jobs = lora_grad_jobs(weights.a, weights.tiles) + lora_grad_jobs(weights.b, weights.tiles), row_bytes = 0;
  if (jobs == 0 || plane_size == 0) return 1;
  for (const GradSide<T>* side : {&weights.a, &weights.b}) {
    if (side->experts > 0) row_bytes += static_cast<int64_t>(side->groups) * side->cols * sizeof(T);
  }
  int64_t most = std::min(rows / 128, rows * row_bytes / (32 * plane_size));
  return static_cast<int>(std::max<int64_t>(1, std::min(2 * device.multiprocessors / jobs, most)));
}

// Whether a block has room for what routed_lora_dx_mma.cu sums of at most 16 ranks: eight shares of 32 rows, every
// group's columns from a multiple of 16 on. Those of four groups, the most that it takes, are more than a T4 has.
bool holds_sums(const Call& call, const Device& device) {
  int columns = 16 * (call.ranges.groups | 1), narrow = 32 * 16 * 2, experts = 32 * 4;
  bool takes = call.ranks <= 16 && call.ranges.groups <= 4;
  return !takes || 8 * 32 * columns * 4 + narrow + experts <= device.shared_bytes;
}

// Writes out [B, S, N] and returns t; out may be base itself.
Tensor run_forward(Call& call, const Device& device, Tensor x, Tensor lora_a, Tensor lora_b, OptionalTensor base,
                   const Tensor& out) {
  Tensor t = allocate(x, {call.batch, call.tokens, call.ranks});
  x = with_contiguous_rows(x), lora_a = as_contiguous(lora_a), lora_b = as_contiguous(lora_b);
  if (base.has_value()) base = with_contiguous_rows(*base);
  DeviceScope scope(device);
  dispatch(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    RoutedLoraForward<T> params{};
    params.x = rows_of<const T>(x);
    params.base = rows_of<const T>(base);
    params.out = data<T>(out);
    params.t = data<T>(t);
    params.width = call.width;
    fill<T>(params, call, lora_a, lora_b);
    params.out_aligned = is_aligned(params.out, {call.width}, sizeof(T));
    launch_routed_lora_forward(params, device);
  });
  return t;
}

// The backward in one pass, where held_pass_plan has one and all lies at multiples of 16 bytes; whether it was
// launched. Its tensors' rows are contiguous.
bool launch_in_one_pass(const Call& call, const Device& device, const Tensor& grad_out, const Tensor& x,
                        const Tensor& t, const Tensor& lora_a, const Tensor& lora_b, const Tensor& dx, const Tensor& da,
                        const Tensor& db, bool need_x, bool need_a, bool need_b) {
  bool launched = false, square = call.features == call.ranges.cols && call.features == call.width;
  if (call.ranges.groups != 1 || !square || !(need_a || need_b)) return false;
  dispatch(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (kFragmentsFrom<T> > 0) {
      OnePass<T> params{};
      params.grad_out = rows_of<const T>(grad_out);
      params.x = rows_of<const T>(x);
      params.narrow = data<const T>(t);
      params.down_weight = data<const T>(lora_a);
      params.up_weight = data<const T>(lora_b);
      params.dx = need_x ? data<T>(dx) : nullptr;
      PassPlan plan =
          held_pass_plan<T>(call.batch, call.tokens, call.features, call.rank, call.a, call.b, false, device);
      limit_cluster(plan, call.a, call.b);
      if (plan.blocks == 0 || !params.grad_out.aligned || !params.x.aligned ||
          !is_aligned(params.narrow, {}, sizeof(T)) || !is_aligned(params.down_weight, {}, sizeof(T)) ||
          !is_aligned(params.up_weight, {}, sizeof(T)) || !is_aligned(params.dx, {}, sizeof(T))) {
        return;
      }
      Tensor planes = allocate(x, {plan.floats()}, ScalarType::Float);
      PassSum<T> sum{};
      follow(plan, data<float>(planes), call.tokens, call.features, call.rank, params, sum);
      params.down = call.a;
      params.up = call.b;
      params.dropout = call.dropout;
      params.scaling = call.scaling;
      params.need_down = need_a, params.need_up = need_b;
      if constexpr (kIsHalf<T>) {
        if (holds_pass<T>(device)) launch_held_pass<true>(params, plan, device);
      }
      if (!holds_pass<T>(device)) launch_routed_lora_one_pass(params, plan, device);
      sum.down_weight = data<T>(da), sum.up_weight = data<T>(db);
      sum.down_scale = call.dropout.seed == nullptr ? 1.f : call.dropout.scale, sum.up_scale = call.scaling;
      launch_routed_lora_pass_sum(sum, need_a ? static_cast<int>(call.experts_a) : 0,
                                  need_b ? static_cast<int>(call.experts_b) : 0, device);
      launched = true;
    }
  });
  return launched;
}

}  // namespace

std::tuple<Tensor, Tensor> routed_lora_forward(Tensor x, Tensor lora_a, Tensor lora_b, OptionalTensor a_index,
                                               OptionalTensor b_index, OptionalTensor base, OptionalTensor seed,
                                               double scaling, int64_t groups, std::vector<int64_t> offsets,
                                               double dropout_p) {
  Call call = check_call(x, lora_a, lora_b, a_index, b_index, "base", base, seed, scaling, groups, offsets, dropout_p);
  Device device = check_device("x", x);
  Tensor out = allocate(x, {call.batch, call.tokens, call.width});
  Tensor t = run_forward(call, device, x, lora_a, lora_b, base, out);
  return {out, t};
}

Tensor routed_lora_forward_inplace(Tensor x, Tensor lora_a, Tensor lora_b, OptionalTensor a_index,
                                   OptionalTensor b_index, Tensor base, OptionalTensor seed, double scaling,
                                   int64_t groups, std::vector<int64_t> offsets, double dropout_p) {
  Call call = check_call(x, lora_a, lora_b, a_index, b_index, "base", base, seed, scaling, groups, offsets, dropout_p);
  if (!base.is_contiguous()) fail("base", "a tensor that is not contiguous", "a contiguous one to be overwritten");
  Device device = check_device("x", x);
  call.ranges.gaps = 0;
  return run_forward(call, device, x, lora_a, lora_b, base, base);
}

std::tuple<Tensor, Tensor, Tensor> routed_lora_backward(Tensor grad_out, Tensor x, Tensor t, Tensor lora_a,
                                                        Tensor lora_b, OptionalTensor a_index, OptionalTensor b_index,
                                                        OptionalTensor seed, bool need_x, bool need_a, bool need_b,
                                                        double scaling, int64_t groups, std::vector<int64_t> offsets,
                                                        double dropout_p) {
  Call call =
      check_call(x, lora_a, lora_b, a_index, b_index, "grad_out", grad_out, seed, scaling, groups, offsets, dropout_p);
  check_like("t", t, "x", x);
  check_sizes("t", t, "[B, S, groups * r]", {call.batch, call.tokens, call.ranks});
  Device device = check_device("x", x);

  auto gradient = [&](bool needed, const std::vector<int64_t>& sizes) {
    return allocate(x, needed ? sizes : std::vector<int64_t>{0});
  };
  Tensor dx = gradient(need_x, {call.batch, call.tokens, call.features});
  Tensor da = gradient(need_a, {call.experts_a, call.ranks, call.features});
  Tensor db = gradient(need_b, {call.experts_b, groups * call.ranges.cols, call.rank});
  x = with_contiguous_rows(x), grad_out = with_contiguous_rows(grad_out), t = as_contiguous(t);
  lora_a = as_contiguous(lora_a), lora_b = as_contiguous(lora_b);
  DeviceScope scope(device);
  if (launch_in_one_pass(call, device, grad_out, x, t, lora_a, lora_b, dx, da, db, need_x, need_a, need_b)) {
    return {dx, da, db};
  }
  OptionalTensor dt = need_a ? OptionalTensor(allocate(x, {call.batch, call.tokens, call.ranks})) : std::nullopt;
  OptionalTensor planes;
  dispatch(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    PlaneSum<T> sum{};
    RoutedLoraWeightGrad<T> weights{};
    weights.ranges = call.ranges;
    weights.dropout = call.dropout;
    weights.scaling = call.scaling;
    GradSide<T>& of_a = weights.a;
    of_a.groups = 1, of_a.cols = call.features, of_a.ranks = call.ranks;
    if (need_a) {
      of_a.wide = rows_of<const T>(x);
      of_a.narrow = data<const T>(dt);
      of_a.narrow_aligned = is_aligned(of_a.narrow, {call.ranks}, sizeof(T));
      of_a.routing = call.a;
      of_a.other = call.b;
      of_a.weight = sum.add(data<T>(da), da.numel());
      of_a.experts = call.experts_a;
      of_a.ranks_first = true;
    }
    GradSide<T>& of_b = weights.b;
    of_b.groups = groups, of_b.cols = call.ranges.cols, of_b.ranks = call.rank;
    if (need_b) {
      of_b.wide = rows_of<const T>(grad_out);
      of_b.narrow = data<const T>(t);
      of_b.narrow_aligned = is_aligned(of_b.narrow, {call.rank}, sizeof(T));
      of_b.routing = call.b;
      of_b.other = call.a;
      of_b.weight = sum.add(data<T>(db), db.numel());
      of_b.experts = call.experts_b;
    }
    SamplePlan samples{};
    GradSide<T> columns = of_b;
    if (need_b) columns.wide.data += call.ranges.start[0];
    columns.wide.aligned = columns.wide.aligned && call.ranges.start[0] % Piece<T>::kSize == 0;
    if constexpr (kFragmentsFrom<T> > 0) samples = sample_plan(of_a, columns, call.batch, call.tokens, device);
    weights.tiles = count_tiles_of_ranks(weights, device);
    if (samples.shares > 0) {
      planes = allocate(x, {samples.floats()}, ScalarType::Float);
    } else if (weights.tiles > 0) {
      int count = count_lora_shares(weights, call.rows, sum.plane_size, device);
      weights.shares = cut_rows(count, 128, call.rows, sum, x, planes);
    } else {
      weights.shares = share_rows(of_a, of_b, narrow_of<T>(call.ranks), call.rows, sum, x, device, planes);
    }

    if (need_x || need_a) {
      RoutedLoraInputGrad<T> params{};
      params.grad_out = rows_of<const T>(grad_out);
      params.dt = data<T>(dt);
      params.dx = need_x ? data<T>(dx) : nullptr;
      fill<T>(params, call, lora_a, lora_b);
      params.dx_aligned = is_aligned(params.dx, {call.features}, sizeof(T));
      if (sizeof(T) == 2 && !holds_sums(call, device)) params.dx_aligned = false;  // for the kernel of any rows
      launch_routed_lora_input_grad(params, device);
    }
    if constexpr (kFragmentsFrom<T> > 0) {
      if (samples.shares > 0) {
        launch_sample_grads(samples, of_a, columns, call.dropout,
                            call.dropout.seed == nullptr ? 1.f : call.dropout.scale, call.scaling, call.batch,
                            call.tokens, data<float>(planes), device);
        return;
      }
    }
    if (need_a || need_b) launch_routed_lora_weight_grad(weights, device);
    if (weights.shares.count > 1) launch_plane_sum("routed_lora_plane_sum", sum, device);
  });
  return {dx, da, db};
}

}  // namespace adamix
