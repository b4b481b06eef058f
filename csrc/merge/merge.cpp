// Merging's entries from the dispatcher: checks, allocation, launch.
#include "merge/merge.h"

#include <algorithm>
#include <limits>

#include "common/scalar_checks.h"
#include "registration.h"

namespace adamix {
namespace {

// A bank with its scores, checked.
struct Bank {
  int experts, size;
  Kind scored;
};

Bank check_bank(const char* name, const Tensor& bank, const char* scores_name, const OptionalTensor& scores) {
  check_dtype(name, bank);
  if (bank.dim() == 0 || bank.size(0) == 0) fail(name, shape_text(bank), "[M, ...] with at least one expert");
  int64_t experts = bank.size(0);
  if (experts > std::numeric_limits<unsigned short>::max()) fail(name, shape_text(bank), "fewer than 65536 experts");
  Bank checked{static_cast<int>(experts), check_int(name, bank.numel() / experts), Kind::kNone};
  if (scores.has_value()) {
    checked.scored = check_kind(scores_name, *scores);
    check_same_device(scores_name, *scores, name, bank);
    check_sizes(scores_name, *scores, "[M]", {experts});
  }
  return checked;
}

std::vector<int64_t> merged_sizes(const Tensor& bank) {
  auto sizes = bank.sizes();
  return std::vector<int64_t>(sizes.begin() + 1, sizes.end());
}

void* address(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

int blocks_of(int64_t size, int chunk) { return static_cast<int>((size + chunk - 1) / chunk); }

}  // namespace

std::vector<Tensor> merge_banks_forward(std::vector<Tensor> banks, std::vector<OptionalTensor> scores) {
  if (scores.size() != banks.size()) {
    fail("scores", std::to_string(scores.size()) + " of them", "as many as banks: " + std::to_string(banks.size()));
  }
  if (banks.empty()) return {};
  std::vector<Bank> checked;
  bool wide = false;
  for (size_t n = 0; n < banks.size(); ++n) {
    std::string name = "banks[" + std::to_string(n) + "]", scores_name = "scores[" + std::to_string(n) + "]";
    checked.push_back(check_bank(name.c_str(), banks[n], scores_name.c_str(), scores[n]));
    check_like(name.c_str(), banks[n], "banks[0]", banks[0]);
    wide = wide || checked[n].scored == Kind::kDouble;
  }
  Device device = check_device("banks[0]", banks[0]);

  std::vector<Tensor> outs;
  for (size_t n = 0; n < banks.size(); ++n) {
    outs.push_back(allocate(banks[n], merged_sizes(banks[n])));
    banks[n] = as_contiguous(banks[n]);
    if (scores[n].has_value()) scores[n] = as_contiguous(*scores[n]);
  }
  DeviceScope scope(device);
  dispatch(check_dtype("banks[0]", banks[0]), [&](auto type) {
    using T = typename decltype(type)::type;
    MergeBanks<T> params{};
    int64_t blocks = 0;
    auto flush = [&] {
      launch_merge_banks(params, static_cast<int>(blocks), wide, device);
      params = {}, blocks = 0;
    };
    for (size_t n = 0; n < banks.size(); ++n) {
      const Bank& bank = checked[n];
      if (bank.size == 0) continue;
      int more = blocks_of(bank.size, kMergeChunk<T>);
      if (params.banks == kMergeBanks || blocks + more > std::numeric_limits<int>::max()) flush();
      int at = params.banks++;
      params.bank[at] = data<const T>(banks[n]);
      params.out[at] = data<T>(outs[n]);
      params.scores[at] = address(scores[n]);
      params.size[at] = bank.size;
      params.first_block[at] = static_cast<int>(blocks);
      params.experts[at] = static_cast<unsigned short>(bank.experts);
      params.scored[at] = bank.scored;
      params.aligned[at] = is_aligned(params.bank[at], {bank.size}, sizeof(T)) && is_aligned(params.out[at], {}, 1);
      params.most_experts = std::max(params.most_experts, bank.experts);
      blocks += more;
    }
    flush();
  });
  return outs;
}

Tensor merge_experts_forward(Tensor bank, OptionalTensor scores) {
  check_bank("bank", bank, "scores", scores);
  return merge_banks_forward({bank}, {scores})[0];
}

std::tuple<Tensor, Tensor> merge_experts_backward(Tensor grad_out, Tensor bank, OptionalTensor scores, bool need_bank,
                                                  bool need_scores) {
  Bank checked = check_bank("bank", bank, "scores", scores);
  check_like("grad_out", grad_out, "bank", bank);
  check_sizes("grad_out", grad_out, "bank's shape without the first axis", merged_sizes(bank));
  if (need_scores && !scores.has_value()) fail("scores", "none", "scores, as their gradient is wanted");
  Device device = check_device("bank", bank);

  bool wide = checked.scored == Kind::kDouble;
  auto sizes = bank.sizes();
  std::vector<int64_t> none{0}, whole(sizes.begin(), sizes.end());
  Tensor bank_grad = allocate(bank, need_bank ? whole : none);
  Tensor scores_grad = need_scores ? allocate(*scores, {checked.experts}) : allocate(bank, none);
  if (!need_bank && !need_scores) return {bank_grad, scores_grad};
  bank = as_contiguous(bank), grad_out = as_contiguous(grad_out);
  if (scores.has_value()) scores = as_contiguous(*scores);
  DeviceScope scope(device);
  dispatch(check_dtype("bank", bank), [&](auto type) {
    using T = typename decltype(type)::type;
    int blocks = std::min(blocks_of(checked.size, kMergeChunk<T>), kMergeGradBlocks);
    OptionalTensor plane;
    if (need_scores) plane = allocate(bank, {checked.experts, blocks}, wide ? ScalarType::Double : ScalarType::Float);
    MergeGrad<T> params{};
    params.grad = data<const T>(grad_out);
    params.bank = data<const T>(bank);
    params.scores = address(scores);
    params.bank_grad = need_bank ? data<T>(bank_grad) : nullptr;
    params.plane = address(plane);
    params.size = checked.size;
    params.experts = checked.experts;
    params.scored = checked.scored;
    params.aligned = is_aligned(params.bank, {checked.size}, sizeof(T)) && is_aligned(params.grad, {}, 1) &&
                     is_aligned(params.bank_grad, {}, 1);
    launch_merge_grad(params, blocks, wide, device);
    if (need_scores) {
      launch_merge_scores_grad(
          {params.plane, params.scores, scores_grad.data_ptr(), blocks, checked.experts, checked.scored}, wide, device);
    }
  });
  return {bank_grad, scores_grad};
}

Tensor merge_lora_forward(Tensor weight, Tensor lora_a, Tensor lora_b, double scaling, int64_t groups,
                          std::vector<int64_t> offsets, bool fan_in_fan_out) {
  DType dtype = check_dtype("weight", weight);
  check_sizes("weight", weight, fan_in_fan_out ? "[K, N]" : "[N, K]", {-1, -1});
  int64_t outputs = weight.size(fan_in_fan_out ? 1 : 0), features = weight.size(fan_in_fan_out ? 0 : 1);
  Kind kind = check_kind("lora_a", lora_a);
  check_same_device("lora_a", lora_a, "weight", weight);
  check_like("lora_b", lora_b, "lora_a", lora_a);
  if (groups < 1) fail("groups", std::to_string(groups), "at least 1");
  check_sizes("lora_a", lora_a, "[Ma, groups * r, K]", {-1, -1, features});
  if (lora_a.size(0) == 0) fail("lora_a", shape_text(lora_a), "at least one expert");
  if (lora_a.size(1) % groups != 0) fail("lora_a", shape_text(lora_a), "a multiple of groups rows");
  int64_t rank = lora_a.size(1) / groups;
  check_sizes("lora_b", lora_b, "[Mb, groups * Ng, r]", {-1, -1, rank});
  if (lora_b.size(0) == 0) fail("lora_b", shape_text(lora_b), "at least one expert");
  if (lora_b.size(1) % groups != 0) fail("lora_b", shape_text(lora_b), "a multiple of groups rows");
  int64_t per_group = lora_b.size(1) / groups;
  if (static_cast<int64_t>(offsets.size()) != groups) {
    fail("offsets", std::to_string(offsets.size()) + " of them", "one for each of the " + std::to_string(groups));
  }
  for (int64_t offset : offsets) {
    if (offset < 0 || offset + per_group > outputs) {
      fail("offsets", std::to_string(offset), "0 <= offset, offset + Ng <= " + std::to_string(outputs));
    }
  }
  Device device = check_device("weight", weight);

  weight = as_contiguous(weight), lora_a = as_contiguous(lora_a), lora_b = as_contiguous(lora_b);
  Tensor out = allocate(weight, {weight.size(0), weight.size(1)});
  DeviceScope scope(device);
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    MergeLora<T> params{};
    params.weight = data<const T>(weight);
    params.out = data<T>(out);
    params.lora_a = lora_a.data_ptr();
    params.lora_b = lora_b.data_ptr();
    params.scaling = scaling;
    params.a_experts = check_int("lora_a", lora_a.size(0));
    params.b_experts = check_int("lora_b", lora_b.size(0));
    params.height = check_int("weight", weight.size(0));
    params.width = check_int("weight", weight.size(1));
    params.features = check_int("weight", features);
    params.rank = check_int("lora_a", rank);
    params.per_group = check_int("lora_b", per_group);
    params.groups = check_int("groups", groups);
    params.kind = kind;
    params.fan_in_fan_out = fan_in_fan_out;
    params.aligned = is_aligned(params.weight, {params.width}, sizeof(T)) && is_aligned(params.out, {}, 1);
    for (int first = 0; first < params.groups; first += kMergeGroups) {
      params.first_group = first;
      params.here = std::min(kMergeGroups, params.groups - first);
      for (int g = 0; g < params.here; ++g) params.offsets[g] = static_cast<int>(offsets[first + g]);
      launch_merge_lora(params, kind == Kind::kDouble, device);
      params.weight = params.out;
    }
  });
  return out;
}

}  // namespace adamix
