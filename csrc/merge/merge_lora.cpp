// LoRA's entries from the dispatcher: checks, allocation, launch.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/scalar_checks.h"
#include "merge/merge.h"
#include "registration.h"

namespace adamix {
namespace {

// Layers that are alike, checked; contiguous. a_scores: none, or one for each layer.
struct Layers {
  std::vector<Tensor> weights, a, b, a_scores;
  int64_t features, rank, per_group;
  Kind kind;
};

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// [layers, ...] of tensors that are alike, each without its first `less` axes.
std::vector<int64_t> with_layers(const std::vector<Tensor>& tensors, int less = 0) {
  std::vector<int64_t> sizes = sizes_of(tensors[0]);
  sizes.erase(sizes.begin(), sizes.begin() + less);
  sizes.insert(sizes.begin(), static_cast<int64_t>(tensors.size()));
  return sizes;
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

int smaller(int64_t limit, int64_t count) { return static_cast<int>(std::min(limit, count)); }

// Rows, features and ranks of one layer, as both kernels take them.
template <typename Params>
void set_sizes(Params& params, const Layers& layers) {
  params.height = check_int("weight", layers.weights[0].size(0));
  params.width = check_int("weight", layers.weights[0].size(1));
  params.features = check_int("weight", layers.features);
  params.rank = check_int("lora_a", layers.rank);
  params.per_group = check_int("lora_b", layers.per_group);
}

// Each launch of as many layers and groups as the parameters hold, after set(parameters, place in them, layer). What
// earlier groups were merged into is the weight of later ones.
template <typename T, typename Params, typename Set, typename Launch>
void launch_all(Params& params, const Layers& layers, T* out, const std::vector<int64_t>& offsets, Set set,
                Launch launch) {
  int64_t all = static_cast<int64_t>(layers.weights.size()), groups = static_cast<int64_t>(offsets.size());
  int64_t elements = layers.weights[0].numel();
  for (int64_t done = 0; done < all; done += kMergeLayers) {
    params.layers = smaller(kMergeLayers, all - done);
    set(params, static_cast<size_t>(done));
    for (int n = 0; n < params.layers; ++n) params.weight[n] = data<const T>(layers.weights[done + n]);
    for (int64_t first = 0; first < groups; first += kMergeGroups) {
      params.first_group = static_cast<int>(first);
      params.here = smaller(kMergeGroups, groups - first);
      for (int g = 0; g < params.here; ++g) params.offsets[g] = static_cast<int>(offsets[first + g]);
      launch(params);
      for (int n = 0; n < params.layers; ++n) params.weight[n] = out + (done + n) * elements;
    }
  }
}

// Whether matrix units take these layers: 16 bits, of which there are 8 columns at a time from these GPUs on, all of it
// aligned, and a block's part of A fits.
template <typename T>
bool on_matrix_units(const Layers& layers, const Tensor& out, bool fan_in_fan_out, const Device& device) {
  if (sizeof(T) != 2) return false;
  constexpr bool is_half = std::is_same_v<T, half>;
  bool own = layers.kind == (is_half ? Kind::kHalf : Kind::kBFloat16);
  if (!own && layers.kind != Kind::kFloat) return false;
  if (device.capability < (is_half && own ? 75 : 80) || layers.features % 4 != 0 || layers.rank % 4 != 0) return false;
  size_t bytes = merge_lora_product_bytes(check_int("lora_a", layers.rank), check_int("lora_a", layers.a[0].size(0)),
                                          fan_in_fan_out, layers.kind == Kind::kFloat);
  if (bytes > static_cast<size_t>(device.shared_bytes)) return false;
  if (!is_aligned(out.data_ptr(), {layers.weights[0].size(1)}, sizeof(T))) return false;
  for (const auto* tensors : {&layers.weights, &layers.a, &layers.b}) {
    for (const Tensor& tensor : *tensors) {
      if (!is_aligned(tensor.data_ptr(), {}, 1)) return false;
    }
  }
  return true;
}

// a_mean: of banks, [layers, groups * r, K]; null where A is a single factor.
template <typename T>
void merge_on_matrix_units(const Layers& layers, Tensor& out, const Tensor* a_mean, double scaling,
                           const std::vector<int64_t>& offsets, bool fan_in_fan_out, const Device& device) {
  MergeLoraProduct<T> params{};
  set_sizes(params, layers);
  params.scaling = static_cast<float>(scaling);
  params.a.experts = check_int("lora_a", layers.a[0].size(0));
  params.a.stride = layers.a[0].size(1) * layers.a[0].size(2);
  if (!layers.a_scores.empty() && params.a.experts > 1) params.a.scored = check_kind("a_scores", layers.a_scores[0]);
  auto set = [&](MergeLoraProduct<T>& to, size_t done) {
    // The fewer blocks, the seldomer is a mean made; some of them a multiprocessor share the work out evenly.
    int64_t along = to.along(fan_in_fan_out), tiles = along * to.across(fan_in_fan_out) * to.layers;
    int64_t tall = std::clamp<int64_t>(tiles / (int64_t{5} * device.multiprocessors), 1, 8);
    int64_t chunks = std::max<int64_t>(1, (along + tall - 1) / tall);
    to.tall = static_cast<int>(std::max<int64_t>(1, (along + chunks - 1) / chunks));
    to.out = data<T>(out) + static_cast<int64_t>(done) * layers.weights[0].numel();
    if (a_mean != nullptr && to.a.experts > 1) {
      to.a.mean = static_cast<char*>(a_mean->data_ptr()) + done * to.a.stride * a_mean->element_size();
    }
    for (int n = 0; n < to.layers; ++n) {
      to.a.data[n] = layers.a[done + n].data_ptr(), to.b[n] = layers.b[done + n].data_ptr();
      to.a.scores[n] = layers.a_scores.empty() ? nullptr : layers.a_scores[done + n].data_ptr();
    }
  };
  auto launch = [&](const MergeLoraProduct<T>& from) {
    launch_merge_lora_product(from, fan_in_fan_out, layers.kind == Kind::kFloat, device);
  };
  launch_all<T>(params, layers, data<T>(out), offsets, set, launch);
}

template <typename T>
void merge_layers(const Layers& layers, Tensor& out, double scaling, const std::vector<int64_t>& offsets,
                  bool fan_in_fan_out, const Device& device) {
  MergeLora<T> params{};
  set_sizes(params, layers);
  params.a.experts = check_int("lora_a", layers.a[0].size(0));
  params.b.experts = check_int("lora_b", layers.b[0].size(0));
  bool single = params.a.experts == 1 && params.b.experts == 1;
  if constexpr (sizeof(T) == 2) {
    if (single && on_matrix_units<T>(layers, out, fan_in_fan_out, device)) {
      merge_on_matrix_units<T>(layers, out, nullptr, scaling, offsets, fan_in_fan_out, device);
      return;
    }
  }
  params.a.stride = layers.a[0].size(1) * layers.a[0].size(2);
  params.b.stride = layers.b[0].size(1) * layers.b[0].size(2);
  params.scaling = scaling;
  params.kind = layers.kind;
  params.fan_in_fan_out = fan_in_fan_out;
  int64_t elements = layers.weights[0].numel();
  auto set = [&](MergeLora<T>& to, size_t done) {
    to.aligned = true, to.a.by_four = to.features % 4 == 0, to.b.by_four = to.rank % 4 == 0;
    for (int n = 0; n < to.layers; ++n) {
      size_t from = done + n;
      to.out[n] = data<T>(out) + static_cast<int64_t>(from) * elements;
      to.a.data[n] = layers.a[from].data_ptr(), to.b.data[n] = layers.b[from].data_ptr();
      to.aligned = to.aligned && is_aligned(layers.weights[from].data_ptr(), {to.width}, sizeof(T)) &&
                   is_aligned(to.out[n], {}, 1);
      to.a.by_four = to.a.by_four && is_aligned(to.a.data[n], {}, 1);
      to.b.by_four = to.b.by_four && is_aligned(to.b.data[n], {}, 1);
    }
  };
  auto launch = [&](const MergeLora<T>& from) { launch_merge_lora(from, layers.kind == Kind::kDouble, device); };
  launch_all<T>(params, layers, data<T>(out), offsets, set, launch);
}

void make_contiguous(Layers& layers, int64_t groups, bool fan_in_fan_out) {
  const Tensor &weight = layers.weights[0], &a = layers.a[0], &b = layers.b[0];
  layers.features = weight.size(fan_in_fan_out ? 0 : 1);
  layers.rank = a.size(1) / groups, layers.per_group = b.size(1) / groups;
  layers.kind = check_kind("lora_a", a);
  for (auto* each : {&layers.weights, &layers.a, &layers.b, &layers.a_scores}) {
    for (Tensor& tensor : *each) tensor = as_contiguous(tensor);
  }
}

// `out` [layers, ...weight]; its layers lie one after the other.
void merge(Layers layers, Tensor& out, double scaling, const std::vector<int64_t>& offsets, bool fan_in_fan_out,
           const Device& device) {
  make_contiguous(layers, static_cast<int64_t>(offsets.size()), fan_in_fan_out);
  DeviceScope scope(device);
  dispatch(check_dtype("weight", layers.weights[0]), [&](auto type) {
    using T = typename decltype(type)::type;
    merge_layers<T>(layers, out, scaling, offsets, fan_in_fan_out, device);
  });
}

// The lists' lengths, and every layer.
void check_layers(const Layers& layers, int64_t groups, const std::vector<int64_t>& offsets, bool fan_in_fan_out) {
  size_t count = layers.weights.size();
  if (count == 0) fail("weight", "none of them", "at least one");
  for (auto [name, size] : {std::pair{"lora_a", layers.a.size()}, std::pair{"lora_b", layers.b.size()}}) {
    if (size != count) fail(name, std::to_string(size) + " of them", "as many as weights: " + std::to_string(count));
  }
  for (size_t n = 0; n < count; ++n) {
    check_layer(layers, n, "[" + std::to_string(n) + "]", groups, offsets, fan_in_fan_out);
  }
}

void check_scores(const char* name, const std::vector<Tensor>& scores, const std::vector<Tensor>& banks) {
  if (scores.empty()) return;
  if (scores.size() != banks.size()) {
    fail(name, std::to_string(scores.size()) + " of them",
         "none, or as many as weights: " + std::to_string(banks.size()));
  }
  for (size_t n = 0; n < scores.size(); ++n) {
    std::string place = "[" + std::to_string(n) + "]", text = name + place;
    check_kind(text.c_str(), scores[n]);
    check_sizes(text.c_str(), scores[n], "[M]", {banks[n].size(0)});
    check_same_device(text.c_str(), scores[n], "weight[0]", banks[0]);
    if (n > 0) check_like(text.c_str(), scores[n], (name + std::string("[0]")).c_str(), scores[0]);
  }
}

}  // namespace

Tensor merge_lora_forward(Tensor weight, Tensor lora_a, Tensor lora_b, double scaling, int64_t groups,
                          std::vector<int64_t> offsets, bool fan_in_fan_out) {
  Layers layers{{weight}, {lora_a}, {lora_b}, {}, 0, 0, 0, Kind::kNone};
  check_layer(layers, 0, "", groups, offsets, fan_in_fan_out);
  Device device = check_device("weight", weight);
  Tensor out = allocate(weight, sizes_of(weight));
  merge(std::move(layers), out, scaling, offsets, fan_in_fan_out, device);
  return out;
}

Tensor merge_loras_forward(std::vector<Tensor> weights, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                           double scaling, int64_t groups, std::vector<int64_t> offsets, bool fan_in_fan_out) {
  Layers layers{std::move(weights), std::move(lora_a), std::move(lora_b), {}, 0, 0, 0, Kind::kNone};
  check_layers(layers, groups, offsets, fan_in_fan_out);
  Device device = check_device("weight[0]", layers.weights[0]);
  Tensor out = allocate(layers.weights[0], with_layers(layers.weights));
  merge(std::move(layers), out, scaling, offsets, fan_in_fan_out, device);
  return out;
}

// (weights [layers, ...], means of A [layers, groups * r, K], empty where it is no bank), both empty where matrix units
// do not take the layers, or B is a bank, too: nothing was launched then.
std::tuple<Tensor, Tensor> merge_lora_banks_forward(std::vector<Tensor> weights, std::vector<Tensor> lora_a,
                                                    std::vector<Tensor> lora_b, std::vector<Tensor> a_scores,
                                                    double scaling, int64_t groups, std::vector<int64_t> offsets,
                                                    bool fan_in_fan_out) {
  Layers layers{std::move(weights), std::move(lora_a), std::move(lora_b), std::move(a_scores), 0, 0, 0, Kind::kNone};
  check_layers(layers, groups, offsets, fan_in_fan_out);
  check_scores("a_scores", layers.a_scores, layers.a);
  Device device = check_device("weight[0]", layers.weights[0]);
  make_contiguous(layers, groups, fan_in_fan_out);
  Tensor out = allocate(layers.weights[0], with_layers(layers.weights)), a_mean = allocate(layers.a[0], {0});
  bool wide = !layers.a_scores.empty() && layers.a_scores[0].scalar_type() == ScalarType::Double;
  bool fits = !wide && layers.b[0].size(0) == 1 && out.numel() > 0 && layers.rank > 0 && layers.per_group > 0;
  bool served = false;
  DeviceScope scope(device);
  dispatch(check_dtype("weight", layers.weights[0]), [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      served = fits && on_matrix_units<T>(layers, out, fan_in_fan_out, device);
      if (!served) return;
      if (layers.a[0].size(0) > 1) a_mean = allocate(layers.a[0], with_layers(layers.a, 1));
      merge_on_matrix_units<T>(layers, out, &a_mean, scaling, offsets, fan_in_fan_out, device);
    }
  });
  if (!served) out = allocate(layers.weights[0], {0});
  return {out, a_mean};
}

}  // namespace adamix
