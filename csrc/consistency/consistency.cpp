// The consistency losses' entries from the dispatcher: checks, rows in memory, allocation, launch.
#include "consistency/consistency.h"

#include <algorithm>

#include "common/scalar_checks.h"
#include "consistency/row_tensors.h"
#include "registration.h"

namespace adamix {
namespace {

// Both passes' rows: `skip` outer rows of `second` come before its first.
struct Pairs {
  Tensor first, second;
  int64_t skip;
  int rows, classes;
  OptionalTensor labels, mask, items;
};

int row_count(const char* name, const std::vector<int64_t>& leading) {
  int64_t rows = 1;
  for (int64_t size : leading) rows *= size;
  if (rows > (int64_t{1} << 31) - (1 << 16)) fail(name, std::to_string(rows) + " rows", "fewer than 2^31 - 2^16");
  return static_cast<int>(rows);
}

void check_classes(const char* name, const Tensor& logits, const char* layout) {
  check_dtype(name, logits);
  if (logits.dim() < 1 || logits.size(logits.dim() - 1) < 1) fail(name, shape_text(logits), layout);
}

void check_mask(const OptionalTensor& mask, const std::vector<int64_t>& leading, const char* like_name,
                const Tensor& like) {
  if (!mask.has_value()) return;
  if (mask->scalar_type() != ScalarType::Bool) {
    fail("mask", torch::headeronly::toString(mask->scalar_type()), "Bool");
  }
  check_same_device("mask", *mask, like_name, like);
  check_sizes("mask", *mask, "one value a row", leading);
}

void check_float(const char* name, const Tensor& tensor, const char* like_name, const Tensor& like, const char* layout,
                 const std::vector<int64_t>& sizes) {
  if (tensor.scalar_type() != ScalarType::Float) {
    fail(name, torch::headeronly::toString(tensor.scalar_type()), "Float");
  }
  check_same_device(name, tensor, like_name, like);
  check_sizes(name, tensor, layout, sizes);
}

void check_gradient(const char* name, const OptionalTensor& gradient, const char* like_name, const Tensor& like) {
  if (!gradient.has_value()) return;
  check_like(name, *gradient, like_name, like);
  auto sizes = like.sizes();
  check_sizes(name, *gradient, "the shape of the logits", std::vector<int64_t>(sizes.begin(), sizes.end()));
}

Pairs check_pair(const Tensor& logits_a, const Tensor& logits_b, const OptionalTensor& mask) {
  check_classes("logits_a", logits_a, "[..., V] with V >= 1");
  check_gradient("logits_b", logits_b, "logits_a", logits_a);
  std::vector<int64_t> leading = leading_sizes(logits_a);
  check_mask(mask, leading, "logits_a", logits_a);
  int classes = check_int("V", logits_a.size(logits_a.dim() - 1));
  return {logits_a, logits_b, 0, row_count("logits_a", leading), classes, std::nullopt, mask, std::nullopt};
}

Pairs check_doubled(const Tensor& logits, const Tensor& labels, const OptionalTensor& mask,
                    const OptionalTensor& num_items) {
  check_classes("logits", logits, "[2B, ..., V] with V >= 1");
  if (logits.dim() < 2 || logits.size(0) % 2 != 0) fail("logits", shape_text(logits), "[2B, ..., V]");
  std::vector<int64_t> leading = leading_sizes(logits);
  leading[0] /= 2;
  if (labels.scalar_type() != ScalarType::Int && labels.scalar_type() != ScalarType::Long) {
    fail("labels", torch::headeronly::toString(labels.scalar_type()), "Int or Long");
  }
  check_same_device("labels", labels, "logits", logits);
  check_sizes("labels", labels, "one class a row of the first pass", leading);
  check_mask(mask, leading, "logits", logits);
  if (num_items.has_value()) {
    check_kind("num_items", *num_items, true);
    check_same_device("num_items", *num_items, "logits", logits);
    check_sizes("num_items", *num_items, "[]", {});
  }
  int classes = check_int("V", logits.size(logits.dim() - 1));
  return {logits, logits, leading[0], row_count("logits", leading), classes, labels, mask, num_items};
}

struct Options {
  double weight, smoothing;
  int64_t ignore_index;
  bool full;
};

PairSums sums_of(Pairs& pairs, const Options& options, bool mean) {
  PairSums sums{};
  sums.labels = per_row<void>(pairs.labels);
  sums.wide_labels = pairs.labels.has_value() && pairs.labels->scalar_type() == ScalarType::Long;
  sums.mask = per_row<unsigned char>(pairs.mask);
  sums.mean = mean;
  sums.items = pairs.items.has_value() ? check_kind("num_items", *pairs.items, true) : Kind::kNone;
  sums.num_items = pairs.items.has_value() ? pairs.items->data_ptr() : nullptr;
  sums.ignore_index = options.ignore_index;
  sums.weight = static_cast<float>(options.weight);
  sums.rows = pairs.rows;
  return sums;
}

// Where a forward's results go; sums has the scalars.
struct Results {
  PairSums sums;
  float* stats;
  float* row_losses;
};

// What a plan needs beside the arguments, and its launches.
template <typename T>
void launch_forward(const Pairs& pairs, PairSums sums, PairLoss<T> params, const PairPlan& plan, const Device& device) {
  int groups = plan.groups * std::max(plan.splits, 1);
  bool gradients = params.da.data != nullptr || params.db.data != nullptr;
  OptionalTensor partial, parts;
  if (groups > 1 && (sums.loss != nullptr || sums.sums != nullptr)) {
    partial = allocate(pairs.first, {2, groups}, ScalarType::Float);
    sums.partial = data<float>(partial), sums.parts = groups;
  }
  if (plan.splits > 1) {
    parts = allocate(pairs.first, {plan.splits, kPairParts, pairs.rows}, ScalarType::Float);
    params.parts = data<float>(parts);
  }
  bool unknown = sums.mean && sums.known == nullptr && sums.items == Kind::kNone &&
                 (sums.labels.data != nullptr || sums.mask.data != nullptr);
  if (gradients && unknown && static_cast<int64_t>(pairs.rows) * groups > kPairCounted) {
    launch_pair_count(sums, device);
    sums.known = sums.scales;
  }
  params.sums = sums;
  params.counts = gradients || groups == 1;
  launch_pair_loss(params, plan, device);
  if (groups != 1) launch_pair_finish(sums, device);
}

void run_forward(Pairs& pairs, const Options& options, Results results, const Target& da, const Target& db,
                 int64_t gradient_skip, const Device& device) {
  pairs.first = with_rows(pairs.first);
  pairs.second = pairs.skip > 0 ? pairs.first : with_rows(pairs.second);
  dispatch(check_dtype("logits", pairs.first), [&](auto type) {
    using T = typename decltype(type)::type;
    PairLoss<T> params{};
    params.a = pair_rows<const T>(pairs.first, 0);
    params.b = pair_rows<const T>(pairs.second, pairs.skip);
    params.da = da.template rows<T>();
    params.db = db.template rows<T>(gradient_skip);
    params.stats = results.stats;
    params.row_losses = results.row_losses;
    params.smoothing = static_cast<float>(options.smoothing);
    params.rest = params.smoothing / static_cast<float>(pairs.classes);
    params.classes = pairs.classes;
    params.full = options.full;
    for (;;) {
      PairPlan plan = plan_pairs(pairs.rows, pairs.classes, sizeof(T), device, largest_pair_cluster<T>(device));
      try {
        return launch_forward(pairs, results.sums, params, plan, device);
      } catch (const ClusterError&) {
        rule_out_pair_cluster<T>(device, plan.cluster);
      }
    }
  });
}

void run_backward(Pairs& pairs, const Options& options, OptionalTensor grad, const Tensor& stats, const Tensor& scales,
                  bool correct, const Target& da, const Target& db, int64_t gradient_skip, const Device& device) {
  pairs.first = with_rows(pairs.first);
  pairs.second = pairs.skip > 0 ? pairs.first : with_rows(pairs.second);
  dispatch(check_dtype("logits", pairs.first), [&](auto type) {
    using T = typename decltype(type)::type;
    PairGrad<T> params{};
    params.a = pair_rows<const T>(pairs.first, 0);
    params.b = pair_rows<const T>(pairs.second, pairs.skip);
    params.da = da.template rows<T>();
    params.db = db.template rows<T>(gradient_skip);
    params.sums = sums_of(pairs, options, true);
    params.grad = per_row<float>(grad);
    params.stats = data<const float>(stats);
    params.scales = data<const float>(scales);
    params.smoothing = static_cast<float>(options.smoothing);
    params.rest = params.smoothing / static_cast<float>(pairs.classes);
    params.classes = pairs.classes;
    params.full = options.full;
    params.correct = correct;
    launch_pair_grad(params, device);
  });
}

std::vector<int64_t> with_first(int64_t first, std::vector<int64_t> rest) {
  rest.insert(rest.begin(), first);
  return rest;
}

bool is_half(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Half; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> consistency_forward(Tensor logits_a, Tensor logits_b, OptionalTensor mask,
                                                               bool detach_target, std::string reduction,
                                                               OptionalTensor da, OptionalTensor db) {
  Pairs pairs = check_pair(logits_a, logits_b, mask);
  check_gradient("da", da, "logits_a", logits_a);
  check_gradient("db", db, "logits_a", logits_a);
  bool none = reduction == "none";
  if (!none && reduction != "batchmean" && reduction != "sum") {
    fail("reduction", "'" + reduction + "'", "'batchmean', 'sum' or 'none'");
  }
  if (none && (da.has_value() || db.has_value())) fail("reduction", "'none'", "another, as da or db is wanted");
  Device device = check_device("logits_a", logits_a);

  std::vector<int64_t> leading = leading_sizes(logits_a);
  Tensor stats = allocate(logits_a, with_first(detach_target ? 4 : 6, leading), ScalarType::Float);
  Tensor loss = allocate(logits_a, none ? leading : std::vector<int64_t>{}, ScalarType::Float);
  Tensor scale = allocate(logits_a, {}, ScalarType::Float), factor = allocate(logits_a, {}, ScalarType::Float);
  Options options{1.0, 0.0, 0, !detach_target};
  Results results{sums_of(pairs, options, reduction == "batchmean"), data<float>(stats),
                  none ? data<float>(loss) : nullptr};
  results.sums.held = is_half(logits_a);
  results.sums.scales = data<float>(scale), results.sums.factor = data<float>(factor);
  if (!none) results.sums.loss = data<float>(loss);
  Target to_a(da), to_b(db);
  DeviceScope scope(device);
  run_forward(pairs, options, results, to_a, to_b, 0, device);
  to_a.put_back(), to_b.put_back();
  return {loss, stats, scale, factor};
}

void consistency_backward(Tensor grad, Tensor logits_a, Tensor logits_b, OptionalTensor mask, Tensor stats,
                          Tensor scale, bool detach_target, OptionalTensor da, OptionalTensor db, bool correct) {
  Pairs pairs = check_pair(logits_a, logits_b, mask);
  std::vector<int64_t> leading = leading_sizes(logits_a);
  check_float("grad", grad, "logits_a", logits_a, "[], or one value a row",
              grad.dim() == 0 ? std::vector<int64_t>{} : leading);
  if (correct && grad.dim() != 0) fail("grad", shape_text(grad), "[], as da and db hold the gradients for 1");
  check_float("stats", stats, "logits_a", logits_a, "[4 or 6, ...]", with_first(detach_target ? 4 : 6, leading));
  check_float("scale", scale, "logits_a", logits_a, "[]", {});
  check_gradient("da", da, "logits_a", logits_a);
  check_gradient("db", db, "logits_a", logits_a);
  Device device = check_device("logits_a", logits_a);
  Target to_a(da), to_b(db);
  DeviceScope scope(device);
  stats = as_contiguous(stats);
  run_backward(pairs, {1.0, 0.0, 0, !detach_target}, grad, stats, scale, correct, to_a, to_b, 0, device);
  to_a.put_back(), to_b.put_back();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adamix_forward(Tensor logits, Tensor labels,
                                                                          OptionalTensor mask, OptionalTensor num_items,
                                                                          double weight, int64_t ignore_index,
                                                                          double label_smoothing, bool detach_target,
                                                                          OptionalTensor d_logits) {
  Pairs pairs = check_doubled(logits, labels, mask, num_items);
  check_gradient("d_logits", d_logits, "logits", logits);
  Device device = check_device("logits", logits);

  Tensor stats = allocate(logits, with_first(detach_target ? 2 : 3, leading_sizes(logits)), ScalarType::Float);
  auto scalar = [&] { return allocate(logits, {}, ScalarType::Float); };
  Tensor loss = scalar(), cross_entropy = scalar(), consistency = scalar(), factor = scalar();
  Tensor scales = allocate(logits, {2}, ScalarType::Float);
  Options options{weight, label_smoothing, ignore_index, !detach_target};
  Results results{sums_of(pairs, options, true), data<float>(stats), nullptr};
  results.sums.held = is_half(logits);
  results.sums.scales = data<float>(scales), results.sums.factor = data<float>(factor);
  results.sums.loss = data<float>(loss), results.sums.cross_entropy = data<float>(cross_entropy);
  results.sums.consistency = data<float>(consistency);
  Target to(d_logits);
  DeviceScope scope(device);
  run_forward(pairs, options, results, to, to, pairs.skip, device);
  to.put_back();
  return {loss, cross_entropy, consistency, stats, scales, factor};
}

void adamix_backward(Tensor grad, Tensor logits, Tensor labels, OptionalTensor mask, Tensor stats, Tensor scales,
                     double weight, int64_t ignore_index, double label_smoothing, bool detach_target, Tensor d_logits,
                     bool correct) {
  Pairs pairs = check_doubled(logits, labels, mask, std::nullopt);
  check_float("grad", grad, "logits", logits, "[]", {});
  check_float("stats", stats, "logits", logits, "[2 or 3, 2B, ...]",
              with_first(detach_target ? 2 : 3, leading_sizes(logits)));
  check_float("scales", scales, "logits", logits, "[2]", {2});
  check_gradient("d_logits", d_logits, "logits", logits);
  Device device = check_device("logits", logits);
  Target to(d_logits);
  DeviceScope scope(device);
  stats = as_contiguous(stats), scales = as_contiguous(scales);
  run_backward(pairs, {weight, label_smoothing, ignore_index, !detach_target}, grad, stats, scales, correct, to, to,
               pairs.skip, device);
  to.put_back();
}

Tensor adamix_chunk(Tensor logits, Tensor labels, OptionalTensor mask, Tensor factors, int64_t ignore_index,
                    double label_smoothing, bool detach_target, bool need_grad) {
  Pairs pairs = check_doubled(logits, labels, mask, std::nullopt);
  check_float("factors", factors, "logits", logits, "[2]", {2});
  Device device = check_device("logits", logits);
  Tensor sums = allocate(logits, {2}, ScalarType::Float);
  factors = as_contiguous(factors);
  Options options{1.0, label_smoothing, ignore_index, !detach_target};
  Results results{sums_of(pairs, options, true), nullptr, nullptr};
  results.sums.known = data<const float>(factors);
  results.sums.sums = data<float>(sums);
  Target to(need_grad ? OptionalTensor(logits) : std::nullopt);
  DeviceScope scope(device);
  run_forward(pairs, options, results, to, to, pairs.skip, device);
  to.put_back();
  return sums;
}

void consistency_rescale(Tensor gradient, Tensor factor) {
  check_classes("gradient", gradient, "[..., V] with V >= 1");
  check_float("factor", factor, "gradient", gradient, "[]", {});
  int rows = row_count("gradient", leading_sizes(gradient));
  int classes = check_int("V", gradient.size(gradient.dim() - 1));
  Device device = check_device("gradient", gradient);
  DeviceScope scope(device);
  Tensor written = with_rows(gradient);
  dispatch(check_dtype("gradient", gradient), [&](auto type) {
    using T = typename decltype(type)::type;
    PairScale<T> params{pair_rows<T>(written, 0), data<const float>(factor), rows, classes, {}};
    launch_pair_scale(params, device);
  });
  if (written.data_ptr() != gradient.data_ptr()) torch::stable::copy_(gradient, written);
}

std::vector<int64_t> consistency_plan(int64_t rows, int64_t classes, int64_t element_bytes, int64_t capability,
                                      int64_t shared_bytes, int64_t multiprocessors) {
  if (element_bytes != 2 && element_bytes != 4) fail("element_bytes", std::to_string(element_bytes), "2 or 4");
  Device device{0, check_int("multiprocessors", multiprocessors), check_int("shared_bytes", shared_bytes),
                check_int("capability", capability), nullptr};
  PairPlan plan = plan_pairs(check_int("rows", rows), check_int("classes", classes), static_cast<int>(element_bytes),
                             device, device.capability >= 90 ? 8 : 1);
  return {plan.lanes, plan.threads, plan.cluster, plan.slots, plan.splits, plan.groups};
}

}  // namespace adamix
