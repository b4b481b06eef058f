// LoRA's entries from the dispatcher: checks, allocation, launch.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/scalar_checks.h"
#include "merge/merge.h"
#include "registration.h"

namespace adamix {
namespace {

// Layers that are alike, checked; contiguous.
struct Layers {
  std::vector<Tensor> weights, a, b;
  int64_t features, rank, per_group;
  Kind kind;
};

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

void check_layer(const Layers& layers, size_t n, const std::string& place, int64_t groups,
                 const std::vector<int64_t>& offsets, bool fan_in_fan_out) {
  const Tensor &weight = layers.weights[n], &a = layers.a[n], &b = layers.b[n];
  std::string weight_name = "weight" + place, a_name = "lora_a" + place, b_name = "lora_b" + place;
  check_dtype(weight_name.c_str(), weight);
  check_sizes(weight_name.c_str(), weight, fan_in_fan_out ? "[K, N]" : "[N, K]", {-1, -1});
  int64_t outputs = weight.size(fan_in_fan_out ? 1 : 0), features = weight.size(fan_in_fan_out ? 0 : 1);
  check_kind(a_name.c_str(), a);
  check_same_device(a_name.c_str(), a, weight_name.c_str(), weight);
  check_like(b_name.c_str(), b, a_name.c_str(), a);
  if (groups < 1) fail("groups", std::to_string(groups), "at least 1");
  check_sizes(a_name.c_str(), a, "[Ma, groups * r, K]", {-1, -1, features});
  if (a.size(0) == 0) fail(a_name.c_str(), shape_text(a), "at least one expert");
  if (a.size(1) % groups != 0) fail(a_name.c_str(), shape_text(a), "a multiple of groups rows");
  check_sizes(b_name.c_str(), b, "[Mb, groups * Ng, r]", {-1, -1, a.size(1) / groups});
  if (b.size(0) == 0) fail(b_name.c_str(), shape_text(b), "at least one expert");
  if (b.size(1) % groups != 0) fail(b_name.c_str(), shape_text(b), "a multiple of groups rows");
  if (static_cast<int64_t>(offsets.size()) != groups) {
    fail("offsets", std::to_string(offsets.size()) + " of them", "one for each of the " + std::to_string(groups));
  }
  for (int64_t offset : offsets) {
    if (offset < 0 || offset + b.size(1) / groups > outputs) {
      fail("offsets", std::to_string(offset), "0 <= offset, offset + Ng <= " + std::to_string(outputs));
    }
  }
  if (n == 0) return;
  check_like(weight_name.c_str(), weight, "weight[0]", layers.weights[0]);
  check_like(a_name.c_str(), a, "lora_a[0]", layers.a[0]);
  check_sizes(weight_name.c_str(), weight, "the first one's shape", sizes_of(layers.weights[0]));
  check_sizes(a_name.c_str(), a, "the first one's shape", sizes_of(layers.a[0]));
  check_sizes(b_name.c_str(), b, "the first one's shape", sizes_of(layers.b[0]));
}

template <typename T>
void merge_layers(const Layers& layers, Tensor& out, double scaling, int64_t groups,
                  const std::vector<int64_t>& offsets, bool fan_in_fan_out, const Device& device) {
  MergeLora<T> params{};
  const Tensor& first_weight = layers.weights[0];
  params.a.experts = check_int("lora_a", layers.a[0].size(0));
  params.b.experts = check_int("lora_b", layers.b[0].size(0));
  params.a.stride = layers.a[0].size(1) * layers.a[0].size(2);
  params.b.stride = layers.b[0].size(1) * layers.b[0].size(2);
  params.scaling = scaling;
  params.height = check_int("weight", first_weight.size(0));
  params.width = check_int("weight", first_weight.size(1));
  params.features = check_int("weight", layers.features);
  params.rank = check_int("lora_a", layers.rank);
  params.per_group = check_int("lora_b", layers.per_group);
  params.kind = layers.kind;
  params.fan_in_fan_out = fan_in_fan_out;
  bool single = params.a.experts == 1 && params.b.experts == 1;
  int count = check_int("groups", groups);
  size_t all = layers.weights.size();
  int64_t elements = first_weight.size(0) * first_weight.size(1);
  for (size_t done = 0; done < all; done += kMergeLayers) {
    params.layers = static_cast<int>(std::min<size_t>(kMergeLayers, all - done));
    params.aligned = true;
    params.a.by_four = params.features % 4 == 0, params.b.by_four = params.rank % 4 == 0;
    for (int n = 0; n < params.layers; ++n) {
      size_t from = done + n;
      params.weight[n] = data<const T>(layers.weights[from]);
      params.out[n] = data<T>(out) + static_cast<int64_t>(from) * elements;
      params.a.data[n] = layers.a[from].data_ptr(), params.b.data[n] = layers.b[from].data_ptr();
      params.aligned =
          params.aligned && is_aligned(params.weight[n], {params.width}, sizeof(T)) && is_aligned(params.out[n], {}, 1);
      params.a.by_four = params.a.by_four && is_aligned(params.a.data[n], {}, 1);
      params.b.by_four = params.b.by_four && is_aligned(params.b.data[n], {}, 1);
    }
    bool whole = params.aligned && params.a.by_four && params.b.by_four;
    for (int first = 0; first < count; first += kMergeGroups) {
      params.first_group = first;
      params.here = std::min(kMergeGroups, count - first);
      for (int g = 0; g < params.here; ++g) params.offsets[g] = static_cast<int>(offsets[first + g]);
      bool units = false;
      if constexpr (sizeof(T) == 2) {
        constexpr bool is_half = std::is_same_v<T, half>;
        bool split = layers.kind == Kind::kFloat, own = layers.kind == (is_half ? Kind::kHalf : Kind::kBFloat16);
        // From these GPUs on there are matrix units for 8 columns at a time.
        units = single && whole && (split || own) && device.capability >= (is_half && own ? 75 : 80);
        if (units) launch_merge_lora_product(params, split, device);
      }
      if (!units) launch_merge_lora(params, layers.kind == Kind::kDouble, device);
      for (int n = 0; n < params.layers; ++n) params.weight[n] = params.out[n];
    }
  }
}

// `out` [layers, ...weight]; its layers lie one after the other.
void merge(Layers layers, Tensor& out, double scaling, int64_t groups, const std::vector<int64_t>& offsets,
           bool fan_in_fan_out, const Device& device) {
  const Tensor &weight = layers.weights[0], &a = layers.a[0], &b = layers.b[0];
  layers.features = weight.size(fan_in_fan_out ? 0 : 1);
  layers.rank = a.size(1) / groups, layers.per_group = b.size(1) / groups;
  layers.kind = check_kind("lora_a", a);
  for (auto* each : {&layers.weights, &layers.a, &layers.b}) {
    for (Tensor& tensor : *each) tensor = as_contiguous(tensor);
  }
  DeviceScope scope(device);
  dispatch(check_dtype("weight", layers.weights[0]), [&](auto type) {
    using T = typename decltype(type)::type;
    merge_layers<T>(layers, out, scaling, groups, offsets, fan_in_fan_out, device);
  });
}

}  // namespace

Tensor merge_lora_forward(Tensor weight, Tensor lora_a, Tensor lora_b, double scaling, int64_t groups,
                          std::vector<int64_t> offsets, bool fan_in_fan_out) {
  Layers layers{{weight}, {lora_a}, {lora_b}, 0, 0, 0, Kind::kNone};
  check_layer(layers, 0, "", groups, offsets, fan_in_fan_out);
  Device device = check_device("weight", weight);
  Tensor out = allocate(weight, sizes_of(weight));
  merge(std::move(layers), out, scaling, groups, offsets, fan_in_fan_out, device);
  return out;
}

Tensor merge_loras_forward(std::vector<Tensor> weights, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                           double scaling, int64_t groups, std::vector<int64_t> offsets, bool fan_in_fan_out) {
  size_t count = weights.size();
  if (count == 0) fail("weight", "none of them", "at least one");
  for (auto [name, size] : {std::pair{"lora_a", lora_a.size()}, std::pair{"lora_b", lora_b.size()}}) {
    if (size != count) fail(name, std::to_string(size) + " of them", "as many as weights: " + std::to_string(count));
  }
  Layers layers{std::move(weights), std::move(lora_a), std::move(lora_b), 0, 0, 0, Kind::kNone};
  for (size_t n = 0; n < count; ++n) {
    check_layer(layers, n, "[" + std::to_string(n) + "]", groups, offsets, fan_in_fan_out);
  }
  Device device = check_device("weight[0]", layers.weights[0]);
  std::vector<int64_t> sizes = sizes_of(layers.weights[0]);
  sizes.insert(sizes.begin(), static_cast<int64_t>(count));
  Tensor out = allocate(layers.weights[0], sizes);
  merge(std::move(layers), out, scaling, groups, offsets, fan_in_fan_out, device);
  return out;
}

}  // namespace adamix
