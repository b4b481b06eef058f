// Calls whose slots are sorted by expert: allocation and launches, three forward and four backward.
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
                     GatedGrads& grads) {
  Rows<const T> x = rows_of<const T>(call.x);
  bool pieces =
      whole.grad_out.aligned && x.aligned && whole.dx_aligned && reinterpret_cast<uintptr_t>(whole.t) % 4 == 0;
  if (!pieces || !sorting_takes(whole, call.one_index, device)) return false;
  Sorted sorted(call, device);
  const Gates& gates = call.gates;
  int64_t pairs = call.rows * gates.slots, size = (pairs * call.ranks + 7) / 8 * 8;
  Tensor narrow = allocate(call.x, {(needs.down + needs.up) * size});
  OptionalTensor y;
  if (needs.x) y = allocate(call.x, {pairs, call.features});
  SortedInputGrad<T> params{};
  static_cast<GatedBanks<T>&>(params) = whole;
  params.order = sorted.order;
  params.grad_out = whole.grad_out;
  params.t = whole.t;
  params.dt = needs.down ? data<T>(narrow) : nullptr;
  params.mixed = needs.up ? data<T>(narrow) + (needs.down ? size : 0) : nullptr;
  params.dgates = whole.dgates;
  params.dgates_kind = whole.dgates_kind;
  params.dx = data<T>(y);
  params.gathers = needs.x || needs.down || needs.gates;
  launch_sorted_input_grad(params, sorted.tiles, device);
  if (needs.x) {
    ColumnRanges all{};
    all.groups = 1, all.cols = params.features;
    sum_pairs<T>(call, *y, Rows<const T>{nullptr, 0, 0, divisor(1), false}, whole.dx, params.features, all, device);
  }
  if (!needs.down && !needs.up) return true;
  SortedWeightGrad<T> weights{};
  weights.down = {x, params.dt, data<T>(grads.down), 1, params.features, params.ranks(), true};
  weights.up = {whole.grad_out, params.mixed, data<T>(grads.up), call.ranges.groups, call.ranges.cols,
                params.rank,    false};
  weights.order = sorted.order, weights.ranges = call.ranges, weights.dropout = call.dropout;
  weights.experts = gates.up.experts;
  launch_sorted_weight_grad(weights, device);
  return true;
}

#define ADAMIX_INSTANTIATE(T)                                                      \
  template bool sorted_forward(const GatedForward<T>&, GatedCall&, const Device&); \
  template bool sorted_backward(const GatedInputGrad<T>&, GatedCall&, const Device&, const GatedNeeds&, GatedGrads&);
ADAMIX_INSTANTIATE(half)
ADAMIX_INSTANTIATE(bfloat16)
#undef ADAMIX_INSTANTIATE

}  // namespace adamix
