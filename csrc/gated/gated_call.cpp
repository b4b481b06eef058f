#include "gated/gated_call.h"

#include <algorithm>

#include "common/scalar_checks.h"

namespace adamix {
namespace {

SlotExperts check_experts(const char* name, const OptionalTensor& index, const Tensor& gates, int64_t experts,
                          int64_t slots, bool dense, std::vector<Tensor>& kept) {
  SlotExperts side{nullptr, index.has_value(), false, check_int("M", experts),
                   static_cast<int>(experts == 1 ? 1 : slots)};
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

bool same_memory(const OptionalTensor& one, const OptionalTensor& other) {
  if (!one.has_value() || !other.has_value()) return false;
  auto strides = [](const Tensor& of) { return std::vector<int64_t>(of.strides().begin(), of.strides().end()); };
  return one->data_ptr() == other->data_ptr() && one->scalar_type() == other->scalar_type() &&
         strides(*one) == strides(*other);
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
  one_index = same_memory(down_index, up_index);
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

void GatedCall::make_banks_contiguous() {
  down = as_contiguous(down), up = as_contiguous(up);
  if (down_bias.has_value()) down_bias = as_contiguous(*down_bias);
  if (up_bias.has_value()) up_bias = as_contiguous(*up_bias);
}

GatedRows::GatedRows(GatedCall& call, const OptionalTensor& of_base, const Tensor& of_out)
    : base(of_base), out(of_out), t(allocate(call.x, {call.batch, call.tokens, call.gates.down.slots * call.ranks})) {
  call.x = with_contiguous_rows(call.x);
  if (base.has_value()) base = with_contiguous_rows(*base);
  call.make_banks_contiguous();
}

void run_gated_forward(GatedCall& call, const Device& device, const GatedRows& rows) {
  DeviceScope scope(device);
  dispatch(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    GatedForward<T> params{};
    fill<T>(params, call, rows);
    if constexpr (sizeof(T) == 2) {
      if (launch_gated_forward_mma(params, device) || sorted_forward(params, call, device)) return;
    }
    OptionalTensor mixed = allocate(call.x, {call.rows, call.gates.up.slots, call.ranks}), bias_gates;
    if (call.up_bias.has_value()) bias_gates = allocate(call.x, {call.rows, call.gates.up.slots});
    params.mixed = data<T>(mixed);
    params.bias_gates = data<T>(bias_gates);
    launch_gated_forward(params, device);
  });
}

}  // namespace adamix
