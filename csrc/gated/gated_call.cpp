#include "gated/gated_call.h"

#include <algorithm>

#include "common/row_shares.h"
#include "common/scalar_checks.h"

namespace adamix {
namespace {

// [B, S, C] whose rows, one after another, are all as far apart: `tensor` itself when it is so, else a copy.
Tensor with_even_rows(const Tensor& tensor) {
  Tensor rows = with_contiguous_rows(tensor);
  bool even = rows.size(0) < 2 || rows.size(1) < 2 || rows.stride(0) == rows.size(1) * rows.stride(1);
  return even ? rows : as_contiguous(rows);
}

// Rows of pairs of a row and a slot: each row `slots` times. Of even rows.
template <typename T>
Rows<const T> pair_rows(const Tensor& tensor, int slots) {
  Rows<const T> rows = rows_of<const T>(tensor);
  if (slots <= 1) return rows;
  rows.batch_stride = tensor.size(1) > 1 ? tensor.stride(1) : tensor.stride(0);
  rows.token_stride = 0;
  rows.tokens = divisor(slots);
  return rows;
}

SlotExperts check_experts(const char* name, const OptionalTensor& index, const Tensor& gates, int64_t experts,
                          int64_t slots, bool dense, std::vector<Tensor>& kept) {
  SlotExperts side{nullptr, false, check_int("M", experts), static_cast<int>(experts == 1 ? 1 : slots)};
  if (!index.has_value()) {
    if (experts != 1 && !dense) fail(name, "none", "an index, as the bank holds " + std::to_string(experts));
    return side;
  }
  side.wide = index->scalar_type() == ScalarType::Long;
  if (!side.wide && index->scalar_type() != ScalarType::Int) {
    fail(name, torch::headeronly::toString(index->scalar_type()), "Int or Long");
  }
  check_same_device(name, *index, "x", gates);
  check_sizes(name, *index, "the shape of gates", {gates.sizes().begin(), gates.sizes().end()});
  kept.push_back(as_contiguous(*index));
  side.ids = kept.back().data_ptr();
  return side;
}

}  // namespace

GatedCall::GatedCall(const Tensor& of_x, const Tensor& of_down, const Tensor& of_up, int64_t groups, const Names& names)
    : dtype(check_dtype("x", of_x)), x(of_x), down(of_down), up(of_up) {
  check_sizes("x", x, "[B, S, K]", {-1, -1, -1});
  batch = x.size(0), tokens = x.size(1), features = x.size(2);
  rows = check_int("B * S", batch * tokens);
  check_int("S", tokens), check_int("K", features);
  if (groups < 1 || groups > kMaxGroups) {
    fail("groups", std::to_string(groups), "1 to " + std::to_string(kMaxGroups) + " groups");
  }
  check_like(names.down, down, "x", x);
  check_sizes(names.down, down, names.down_layout, {-1, -1, features});
  down_experts = down.size(0), ranks = check_int("groups * r", down.size(1));
  if (ranks % groups != 0) fail(names.down, shape_text(down), "rows that " + std::to_string(groups) + " groups divide");
  rank = ranks / groups;
  check_like(names.up, up, "x", x);
  check_sizes(names.up, up, names.up_layout, {-1, -1, rank});
  up_experts = up.size(0);
  if (up.size(1) % groups != 0) {
    fail(names.up, shape_text(up), "rows that " + std::to_string(groups) + " groups divide");
  }
  check_int("M * groups * r", std::max(down_experts, up_experts) * ranks);
  ranges = ColumnRanges{};
  ranges.groups = static_cast<int>(groups), ranges.cols = check_int("N", up.size(1) / groups);
  width = ranges.cols;
}

void GatedCall::check_gates(const Tensor& values, const OptionalTensor& down_index, const OptionalTensor& up_index,
                            const OptionalTensor& scales, double scaling, const std::string& mix, const Names& names) {
  if (mix != "outputs" && mix != "weights") fail("mix", "'" + mix + "'", "'outputs' or 'weights'");
  gates_dtype = values.scalar_type();
  if (gates_dtype != ScalarType::Float && gates_dtype != x.scalar_type()) {
    fail("gates", torch::headeronly::toString(gates_dtype), "Float, or the dtype of x");
  }
  check_same_device("gates", values, "x", x);
  has_ids = down_index.has_value() || up_index.has_value();
  int64_t slots = has_ids ? -1 : std::max(down_experts, up_experts);
  if (values.dim() == 2) {
    check_sizes("gates", values, "[B, slots]", {batch, slots});
  } else {
    check_sizes("gates", values, "[B, slots] or [B, S, slots]", {batch, tokens, slots});
  }
  slots = values.size(values.dim() - 1);
  check_int("B * S * slots", rows * std::max<int64_t>(slots, 1));
  if (!has_ids && std::min(down_experts, up_experts) != slots && std::min(down_experts, up_experts) != 1) {
    fail(names.up, shape_text(up), "a bank of one, or of as many experts as " + std::string(names.down));
  }
  kept.reserve(4);
  gates.down = check_experts(names.down_index, down_index, values, down_experts, slots, !has_ids, kept);
  gates.up = check_experts(names.up_index, up_index, values, up_experts, slots, !has_ids, kept);
  kept.push_back(as_contiguous(values));
  gates.values = kept.back().data_ptr();
  gates.kind = check_kind("gates", values);
  gates.rows_per_gate = divisor(values.dim() == 2 && tokens > 0 ? static_cast<int>(tokens) : 1);
  gates.slots = static_cast<int>(slots);
  gates.scaling = static_cast<float>(scaling);
  gates.weights = mix == "weights" && down_experts > 1;
  if (!scales.has_value()) return;
  if (scales->scalar_type() != ScalarType::Float) {
    fail("scales", torch::headeronly::toString(scales->scalar_type()), "Float");
  }
  check_same_device("scales", *scales, "x", x);
  check_sizes("scales", *scales, "[M]", {up_experts > 1 ? up_experts : down_experts});
  kept.push_back(as_contiguous(*scales));
  gates.scales = data<const float>(kept.back());
}

void GatedCall::check_rows(const char* name, const Tensor& rows_like) const {
  check_like(name, rows_like, "x", x);
  check_sizes(name, rows_like, "[B, S, N]", {batch, tokens, width});
}

namespace {

// What forward and backward both know; the banks are contiguous.
template <typename T>
void fill(GatedBanks<T>& banks, const GatedCall& call) {
  banks.down = data<const T>(call.down);
  banks.up = data<const T>(call.up);
  banks.down_bias = data<const T>(call.down_bias);
  banks.up_bias = data<const T>(call.up_bias);
  banks.gates = call.gates;
  banks.ranges = call.ranges;
  banks.dropout = call.dropout;
  banks.activation = call.activation;
  banks.rows = call.rows;
  banks.features = static_cast<int>(call.features);
  banks.rank = static_cast<int>(call.rank);
  banks.by_rank = divisor(std::max(1, banks.rank));
  banks.by_ranks = divisor(std::max(1, static_cast<int>(call.ranks)));
  banks.down_aligned = is_aligned(banks.down, {call.features}, sizeof(T));
  banks.up_aligned = is_aligned(banks.up, {call.rank}, sizeof(T));
}

void make_contiguous(GatedCall& call) {
  call.down = as_contiguous(call.down), call.up = as_contiguous(call.up);
  if (call.down_bias.has_value()) call.down_bias = as_contiguous(*call.down_bias);
  if (call.up_bias.has_value()) call.up_bias = as_contiguous(*call.up_bias);
}

}  // namespace

Tensor run_gated_forward(GatedCall& call, const Device& device, OptionalTensor base, const Tensor& out) {
  Tensor t = allocate(call.x, {call.batch, call.tokens, call.gates.down.slots * call.ranks});
  Tensor mixed = allocate(call.x, {call.rows, call.gates.up.slots, call.ranks});
  OptionalTensor bias_gates;
  if (call.up_bias.has_value()) bias_gates = allocate(call.x, {call.rows, call.gates.up.slots});
  call.x = with_contiguous_rows(call.x);
  if (base.has_value()) base = with_contiguous_rows(*base);
  make_contiguous(call);
  DeviceScope scope(device);
  dispatch(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    GatedForward<T> params{};
    fill<T>(params, call);
    params.x = rows_of<const T>(call.x);
    params.base = rows_of<const T>(base);
    params.out = data<T>(out);
    params.t = data<T>(t);
    params.mixed = data<T>(mixed);
    params.bias_gates = data<T>(bias_gates);
    params.width = call.width;
    params.out_aligned = is_aligned(params.out, {call.width}, sizeof(T));
    launch_gated_forward(params, device);
  });
  return t;
}

namespace {

// One side's sums, without its operands.
template <typename T>
GradSide<T> grad_side(const Rows<const T>& wide, const T* narrow, int experts, int groups, int64_t cols, int64_t ranks,
                      const Routing& routing, bool ranks_first) {
  GradSide<T> side{};
  side.wide = wide, side.narrow = narrow;
  side.routing = routing, side.other = {nullptr, false, divisor(1), 1};
  side.experts = experts, side.groups = groups;
  side.cols = static_cast<int>(cols), side.ranks = static_cast<int>(ranks);
  side.ranks_first = ranks_first;
  side.narrow_aligned = is_aligned(narrow, {ranks}, sizeof(T));
  return side;
}

}  // namespace

GatedGrads run_gated_backward(GatedCall& call, const Device& device, Tensor grad_out, Tensor t, const GatedNeeds& needs,
                              bool biases) {
  const Gates& gates = call.gates;
  auto gradient = [&](bool needed, const std::vector<int64_t>& sizes) {
    return allocate(call.x, needed ? sizes : std::vector<int64_t>{0});
  };
  bool of_samples = call.gates.rows_per_gate.by != 1;
  GatedGrads grads{gradient(needs.x, {call.batch, call.tokens, call.features}),
                   gradient(needs.down, {call.down_experts, call.ranks, call.features}),
                   gradient(needs.down && biases, {call.down_experts, call.ranks}),
                   gradient(needs.up, {call.up_experts, call.ranges.groups * call.ranges.cols, call.rank}),
                   gradient(needs.up && biases, {call.up_experts, call.ranges.cols}),
                   needs.gates ? allocate(call.x, {call.batch, call.tokens, gates.slots},
                                          of_samples ? ScalarType::Float : call.gates_dtype)
                               : allocate(call.x, {0}, call.gates_dtype)};
  if (!(needs.x || needs.down || needs.up || needs.gates)) return grads;
  call.x = with_even_rows(call.x), grad_out = with_even_rows(grad_out), t = as_contiguous(t);
  make_contiguous(call);
  bool of_u = needs.x || needs.down || needs.gates;
  // Scratch: u and dt, what B is multiplied by, and the gates of biases; each at a multiple of 16 bytes.
  auto padded = [](int64_t size) { return (size + 7) / 8 * 8; };
  int64_t down_size = padded(call.rows * gates.down.slots * call.ranks);
  int64_t up_size = padded(call.rows * gates.up.slots * call.ranks);
  int64_t bias_size = needs.up && biases ? padded(call.rows * gates.up.slots) : 0;
  Tensor narrow = allocate(call.x, {(of_u ? up_size + down_size : 0) + (needs.up ? up_size : 0) + bias_size});
  OptionalTensor ids, planes;
  if (call.has_ids && (needs.down || needs.up)) {
    ids = allocate(call.x, {call.rows * (gates.down.slots + gates.up.slots)}, ScalarType::Int);
  }
  DeviceScope scope(device);
  dispatch(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    GatedInputGrad<T> params{};
    fill<T>(params, call);
    T* free = data<T>(narrow);
    auto take = [&](bool wanted, int64_t size) {
      T* from = free;
      if (wanted) free += size;
      return wanted ? from : nullptr;
    };
    params.grad_out = rows_of<const T>(grad_out);
    params.t = data<const T>(t);
    params.u = take(of_u, up_size);
    params.dt = take(of_u, down_size);
    params.mixed = take(needs.up, up_size);
    params.bias_gates = take(bias_size > 0, bias_size);
    params.down_ids = data<int>(ids);
    params.up_ids = params.down_ids == nullptr ? nullptr : params.down_ids + call.rows * gates.down.slots;
    params.dgates = needs.gates ? grads.gates.data_ptr() : nullptr;
    params.dgates_kind = of_samples ? Kind::kFloat : gates.kind;
    params.dx = needs.x ? data<T>(grads.x) : nullptr;
    params.add_input = needs.add_input;
    params.dx_aligned = is_aligned(params.dx, {call.features}, sizeof(T));
    launch_gated_input_grad(params, device);
    if (!needs.down && !needs.up) return;

    // Where slots name experts of their own a product is of the pairs that name one; else all experts' ranks are one
    // expert's, side by side.
    auto routing = [&](int* of, const SlotExperts& side) {
      return Routing{of, false, divisor(1), static_cast<uint32_t>(of == nullptr ? 1 : side.experts)};
    };
    auto together = [&](const SlotExperts& side) { return call.has_ids ? 1 : side.experts; };
    auto apart = [&](const SlotExperts& side) { return call.has_ids ? side.experts : 1; };
    PlaneSum<T> sum{};
    GatedWeightGrad<T> weights{};
    weights.ranges = call.ranges;
    weights.dropout = call.dropout;
    weights.pairs[0] = call.has_ids ? gates.down.slots : 1;
    weights.pairs[1] = weights.pairs[2] = call.has_ids ? gates.up.slots : 1;
    if (needs.down) {
      GradSide<T>& side = weights.side[0];
      side = grad_side<T>(pair_rows<T>(call.x, weights.pairs[0]), params.dt, apart(gates.down), 1, call.features,
                          together(gates.down) * call.ranks, routing(params.down_ids, gates.down), true);
      side.weight = sum.add(data<T>(grads.down), grads.down.numel());
      if (biases) side.bias = sum.add(data<T>(grads.down_bias), grads.down_bias.numel());
      side.bias_of = biases ? BiasOf::kNarrow : BiasOf::kNone;
    }
    if (needs.up) {
      GradSide<T>& side = weights.side[1];
      Rows<const T> wide = pair_rows<T>(grad_out, weights.pairs[1]);
      Routing of_up = routing(params.up_ids, gates.up);
      side = grad_side<T>(wide, params.mixed, apart(gates.up), together(gates.up) * call.ranges.groups,
                          call.ranges.cols, call.rank, of_up, false);
      side.weight = sum.add(data<T>(grads.up), grads.up.numel());
      if (biases) {
        GradSide<T>& bias = weights.side[2];
        bias = grad_side<T>(wide, params.bias_gates, apart(gates.up), 1, call.ranges.cols, together(gates.up), of_up,
                            true);
        bias.weight = sum.add(data<T>(grads.up_bias), grads.up_bias.numel());
      }
    }
    int64_t blocks = 0, row_bytes = 0;
    for (const GradSide<T>& side : weights.side) {
      if (side.experts == 0) continue;
      blocks += blocks_an_expert(side, narrow_of<T>(side.ranks));
      row_bytes += static_cast<int64_t>(side.groups) * side.cols * sizeof(T);
    }
    int count = count_shares(call.rows, blocks, row_bytes, sum.plane_size, device);
    weights.shares = cut_rows(count, kTileRows, call.rows, sum, call.x, planes);
    launch_gated_weight_grad(weights, device);
    if (weights.shares.count > 1) launch_plane_sum("gated_plane_sum", sum, device);
  });
  return grads;
}

}  // namespace adamix
