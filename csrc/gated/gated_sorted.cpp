// Calls whose slots are sorted by expert: allocation and launches, three forward and four backward.
#include "common/fragment_shape.h"
#include "gated/gated_call.h"
#include "gated/sorted.h"

namespace adamix {
namespace {

// The order of a call's pairs, and the memory that it lies in.
struct Sorted {
  PairOrder order;
  int64_t tiles;
  Tensor memory;

  Sorted(const GatedCall& call, const Device& device) {
    const Gates& gates = call.gates;
    int64_t pairs = call.rows * gates.slots, size = PairOrder::size(pairs, gates.up.experts);
    check_int("B * S * slots + 32 * M", size);
    memory = allocate(call.x, {size + 2 * gates.up.experts}, ScalarType::Int);
    PairSort sort{gates, data<int>(memory), data<int>(memory) + size, divisor(gates.slots), static_cast<int>(pairs)};
    order = {sort.at, sort.edges, sort.by_slots};
    tiles = size / kTeamRows;
    launch_gated_sort(sort, gates.up.experts, device);
  }
};

// Whether sorted pairs serve a call of this kind: both sides' ids are one index, gates weigh results, and the banks'
// rows are 16-byte pieces.
template <typename T>
bool sorting_takes(const GatedBanks<T>& p, bool one_index, const Device& device) {
  const Gates& gates = p.gates;
  bool fits = device.capability >= kFragmentsFrom<T> && one_index && gates.down.differ() && gates.up.differ() &&
              gates.down.experts == gates.up.experts && !gates.weights && gates.slots > 0;
  fits = fits && reinterpret_cast<uintptr_t>(p.down_bias) % 4 == 0 && reinterpret_cast<uintptr_t>(p.up_bias) % 16 == 0;
  fits = fits && p.rows > 0 && p.rank > 0 && p.rank % 4 == 0 && p.ranges.groups * round_up(p.rank, 16) <= kChunkRanks;
  fits = fits && p.features > 0 && p.features % 8 == 0 && p.ranges.cols > 0 && p.ranges.cols % 8 == 0;
  for (int group = 0; group < p.ranges.groups; ++group) fits = fits && p.ranges.start[group] % 8 == 0;
  return fits && p.down_aligned && reinterpret_cast<uintptr_t>(p.up) % 8 == 0;
}

template <typename T>
void sum_pairs(const GatedCall& call, const Tensor& y, const Rows<const T>& base, T* out, int width,
               const ColumnRanges& ranges, const Device& device) {
  launch_pair_sum(PairSum<T>{data<const T>(y), base, out, ranges, call.rows, call.gates.slots, width}, device);
}

}  // namespace

template <typename T>
bool sorted_forward(const GatedForward<T>& whole, GatedCall& call, const Device& device) {
  bool pieces = whole.x.aligned && whole.out_aligned && (whole.base.data == nullptr || whole.base.aligned);
  if (!pieces || !sorting_takes(whole, call.one_index, device)) return false;
  Sorted sorted(call, device);
  int64_t inner = static_cast<int64_t>(call.ranges.groups) * call.ranges.cols;
  Tensor y = allocate(call.x, {call.rows * call.gates.slots, inner});
  SortedForward<T> params{};
  static_cast<GatedBanks<T>&>(params) = whole;
  params.order = sorted.order;
  params.x = whole.x;
  params.t = whole.t;
  params.y = data<T>(y);
  launch_sorted_forward(params, sorted.tiles, device);
  sum_pairs<T>(call, y, whole.base, whole.out, whole.width, call.ranges, device);
  return true;
}

template <typename T>
bool sorted_backward(const GatedInputGrad<T>& whole, GatedCall& call, const Device& device, const GatedNeeds& needs,
                     bool biases, GatedGrads& grads) {
  Rows<const T> x = rows_of<const T>(call.x);
  bool pieces =
      whole.grad_out.aligned && x.aligned && whole.dx_aligned && reinterpret_cast<uintptr_t>(whole.t) % 4 == 0;
  if (!pieces || !sorting_takes(whole, call.one_index, device)) return false;
  Sorted sorted(call, device);
  const Gates& gates = call.gates;
  int64_t pairs = call.rows * gates.slots, size = (pairs * call.ranks + 7) / 8 * 8;
  bool of_up_bias = needs.up && biases;
  Tensor narrow = allocate(call.x, {(needs.down + needs.up) * size + (of_up_bias ? pairs : 0)});
  OptionalTensor y;
  if (needs.x) y = allocate(call.x, {pairs, call.features});
  SortedInputGrad<T> params{};
  static_cast<GatedBanks<T>&>(params) = whole;
  params.order = sorted.order;
  params.grad_out = whole.grad_out;
  params.t = whole.t;
  params.dt = needs.down ? data<T>(narrow) : nullptr;
  params.mixed = needs.up ? data<T>(narrow) + (needs.down ? size : 0) : nullptr;
  params.bias_gates = of_up_bias ? data<T>(narrow) + (needs.down + 1) * size : nullptr;
  params.dgates = whole.dgates;
  params.dgates_kind = whole.dgates_kind;
  params.dx = data<T>(y);
  params.gathers = needs.x || needs.down || needs.gates;
  launch_sorted_input_grad(params, sorted.tiles, device);
  if (needs.x) {
    ColumnRanges all{};
    all.groups = 1, all.cols = params.features;
    Rows<const T> added = needs.add_input ? whole.grad_out : Rows<const T>{nullptr, 0, 0, divisor(1), false};
    sum_pairs<T>(call, *y, added, whole.dx, params.features, all, device);
  }
  if (!needs.down && !needs.up) return true;
  SortedWeightGrad<T> weights{};
  auto bias = [&](bool wanted, const Tensor& of) { return wanted && biases ? data<T>(of) : nullptr; };
  weights.down = {x, params.dt,       data<T>(grads.down), bias(needs.down, grads.down_bias),
                  1, params.features, params.ranks(),      true};
  weights.up = {whole.grad_out,     params.mixed,     data<T>(grads.up), bias(needs.up, grads.up_bias),
                call.ranges.groups, call.ranges.cols, params.rank,       false};
  weights.bias_gates = params.bias_gates;
  weights.order = sorted.order, weights.ranges = call.ranges, weights.dropout = call.dropout;
  weights.experts = gates.up.experts;
  launch_sorted_weight_grad(weights, device);
  return true;
}

#define ADAMIX_INSTANTIATE(T)                                                                                 \
  template bool sorted_forward(const GatedForward<T>&, GatedCall&, const Device&);                            \
  template bool sorted_backward(const GatedInputGrad<T>&, GatedCall&, const Device&, const GatedNeeds&, bool, \
                                GatedGrads&);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

}  // namespace adamix
