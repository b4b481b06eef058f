// The backward with gates: allocation, and which kernels serve it.
#include <algorithm>

#include "common/row_shares.h"
#include "gated/dense_side.h"
#include "gated/gated_call.h"

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

// Of any rows: products of one expert are of the pairs of a row and a slot that name it.
template <typename T>
void run_by_pairs(GatedInputGrad<T>& params, GatedCall& call, const Device& device, const Tensor& grad_out,
                  const GatedNeeds& needs, bool biases, GatedGrads& grads) {
  const Gates& gates = call.gates;
  bool of_u = needs.x || needs.down || needs.gates;
  // Scratch: u and dt, what B is multiplied by, and the gates of biases; each at a multiple of 16 bytes.
  // Never empty, as null pointers say what is not wanted.
  auto padded = [](int64_t size) { return (size + 7) / 8 * 8; };
  int64_t down_size = padded(call.rows * gates.down.slots * call.ranks);
  int64_t up_size = padded(call.rows * gates.up.slots * call.ranks);
  int64_t bias_size = needs.up && biases ? padded(call.rows * gates.up.slots) : 0;
  Tensor narrow = allocate(call.x, {(of_u ? up_size + down_size : 0) + (needs.up ? up_size : 0) + bias_size + 8});
  OptionalTensor ids, planes;
  if (call.has_ids && (needs.down || needs.up)) {
    // Nor is this: without ids a side is dense.
    ids = allocate(call.x, {call.rows * (gates.down.slots + gates.up.slots) + 1}, ScalarType::Int);
  }
  T* free = data<T>(narrow);
  auto take = [&](bool wanted, int64_t size) {
    T* from = free;
    if (wanted) free += size;
    return wanted ? from : nullptr;
  };
  params.u = take(of_u, up_size);
  params.dt = take(of_u, down_size);
  params.mixed = take(needs.up, up_size);
  params.bias_gates = take(bias_size > 0, bias_size);
  params.down_ids = data<int>(ids);
  params.up_ids = params.down_ids == nullptr ? nullptr : params.down_ids + call.rows * gates.down.slots;
  launch_gated_input_grad(params, device);
  if (!needs.down && !needs.up) return;

  // Where slots name experts of their own a product is of the pairs that name one; else of all experts' ranks, side by
  // side: one expert's where they lie so in the gradient too.
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
    int groups = call.ranges.groups;
    bool joined = !call.has_ids && groups == 1;
    side = grad_side<T>(wide, params.mixed, joined ? gates.up.experts : apart(gates.up),
                        joined ? 1 : together(gates.up) * groups, call.ranges.cols, call.rank, of_up, false);
    if (joined) side.narrow_aligned = is_aligned(params.mixed, {gates.up.experts * call.rank}, sizeof(T));
    side.weight = sum.add(data<T>(grads.up), grads.up.numel());
    if (biases) {
      GradSide<T>& bias = weights.side[2];
      bias =
          grad_side<T>(wide, params.bias_gates, apart(gates.up), 1, call.ranges.cols, together(gates.up), of_up, true);
      bias.weight = sum.add(data<T>(grads.up_bias), grads.up_bias.numel());
    }
  }
  int most = 0;
  for (const GradSide<T>& side : weights.side) most = side.experts > 0 ? max_of(most, joined_ranks(side)) : most;
  int64_t blocks = 0, row_bytes = 0;
  for (const GradSide<T>& side : weights.side) {
    if (side.experts == 0) continue;
    // Of one expert, as count_shares wants; of all where all serve every row.
    blocks +=
        is_dense(side) ? blocks_of_side(side, narrow_of<T>(most)) : blocks_an_expert(side, narrow_of<T>(side.ranks));
    row_bytes += static_cast<int64_t>(side.groups) * side.cols * sizeof(T);
  }
  int count = count_shares(call.rows, blocks, row_bytes, sum.plane_size, device);
  if (!call.has_ids && blocks > 0) {
    // Every block takes as long: what fills the device once is enough, and planes are bytes.
    int resident = static_cast<int>(device.shared_bytes / gated_grad_block_bytes<T>(most));
    int64_t at_once = static_cast<int64_t>(device.multiprocessors) * max_of(1, resident);
    count = static_cast<int>(std::min<int64_t>(count, std::max<int64_t>(1, at_once / blocks)));
  }
  weights.shares = cut_rows(count, kTileRows, call.rows, sum, call.x, planes);
  launch_gated_weight_grad(weights, device);
  if (weights.shares.count > 1) launch_plane_sum("gated_plane_sum", sum, device);
}

// Of rows of 16-byte pieces: products of all experts at once.
template <typename T>
void run_in_teams(GatedInputGrad<T>& params, GatedCall& call, const Device& device, const GatedNeeds& needs,
                  bool biases, GatedGrads& grads) {
  const Gates& gates = call.gates;
  int experts = gates.up.experts, up_ranks = experts * params.ranks();
  int64_t down_size = (call.rows * gates.down.experts * params.ranks() + 7) / 8 * 8;
  params.mixed_pitch = up_ranks + (needs.up && biases ? round_up(experts, 4) : 0);
  Tensor narrow =
      allocate(call.x, {(needs.down ? down_size : 0) + (needs.up ? call.rows * params.mixed_pitch : 0) + 8});
  OptionalTensor planes;
  params.dt = needs.down ? data<T>(narrow) : nullptr;
  params.mixed = needs.up ? data<T>(narrow) + (needs.down ? down_size : 0) : nullptr;
  params.gathers = needs.x || needs.down || needs.gates;
  launch_gated_input_grad_mma(params, device);
  if (!needs.down && !needs.up) return;
  PlaneSum<T> sum{};
  GatedTeamGrad<T> weights{};
  weights.x = rows_of<const T>(call.x), weights.grad_out = params.grad_out;
  weights.dt = params.dt, weights.mixed = params.mixed, weights.mixed_pitch = params.mixed_pitch;
  weights.gates = gates, weights.ranges = call.ranges, weights.dropout = call.dropout;
  weights.features = params.features, weights.rank = params.rank;
  weights.by_rank = params.by_rank, weights.by_ranks = params.by_ranks;
  int64_t row_bytes = 0;
  if (needs.down) {
    weights.down = sum.add(data<T>(grads.down), grads.down.numel());
    if (biases) weights.down_bias = sum.add(data<T>(grads.down_bias), grads.down_bias.numel());
    row_bytes += call.features * sizeof(T);
  }
  if (needs.up) {
    weights.up = sum.add(data<T>(grads.up), grads.up.numel());
    if (biases) weights.up_bias = sum.add(data<T>(grads.up_bias), grads.up_bias.numel());
    row_bytes += static_cast<int64_t>(call.ranges.groups) * call.ranges.cols * sizeof(T);
  }
  // Shares that fill the device once; planes cost at most a quarter of what they sum, as in count_shares.
  int64_t jobs = weights.down_jobs() + weights.up_jobs();
  int64_t most = std::min(call.rows / 128, call.rows * row_bytes / (32 * sum.plane_size));
  int64_t fill = 2 * device.multiprocessors / jobs;
  weights.large = fill % 2 == 0 && fill > 0 && fill <= most &&
                  gated_large_block_bytes() <= static_cast<size_t>(device.shared_bytes);
  int count = static_cast<int>(std::max<int64_t>(1, weights.large ? fill / 2 : std::min(fill, most)));
  weights.shares = cut_rows(count, 128, call.rows, sum, call.x, planes);
  launch_gated_weight_grad_mma(weights, device);
  if (weights.shares.count > 1) launch_plane_sum("gated_plane_sum", sum, device);
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
  call.make_banks_contiguous();
  DeviceScope scope(device);
  dispatch(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    GatedInputGrad<T> params{};
    fill<T>(params, call);
    params.grad_out = rows_of<const T>(grad_out);
    params.t = data<const T>(t);
    params.dgates = needs.gates ? grads.gates.data_ptr() : nullptr;
    params.dgates_kind = of_samples ? Kind::kFloat : gates.kind;
    params.dx = needs.x ? data<T>(grads.x) : nullptr;
    params.add_input = needs.add_input;
    params.dx_aligned = is_aligned(params.dx, {call.features}, sizeof(T));
    if constexpr (sizeof(T) == 2) {
      bool biased = call.up_bias.has_value() || (needs.up && biases);
      if (rows_of<const T>(call.x).aligned && gated_team_takes(params, biased, device)) {
        return run_in_teams(params, call, device, needs, biases, grads);
      }
      if (sorted_backward(params, call, device, needs, biases, grads)) return;
    }
    run_by_pairs(params, call, device, grad_out, needs, biases, grads);
  });
  return grads;
}

}  // namespace adamix
