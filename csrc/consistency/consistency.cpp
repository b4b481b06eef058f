// The consistency losses' entries from the dispatcher: checks, rows in memory, allocation, launch.
#include "consistency/consistency.h"

#include <algorithm>

#include "common/scalar_checks.h"
#include "consistency/pair_arguments.h"
#include "consistency/row_tensors.h"
#include "registration.h"

namespace adamix {
namespace {

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

// Where a forward's results go, sums has the scalars; and the gradient that its own are written for.
struct Results {
  PairSums sums;
  float* stats;
  float* row_losses;
  double expected;
};

// What a plan needs beside the arguments, and its launches.
template <typename T>
void launch_forward(const Pairs& pairs, PairSums sums, PairLoss<T> params, const PairPlan& plan, const Device& device) {
  bool gradients = params.da.data != nullptr || params.db.data != nullptr;
  OptionalTensor partial;
  if (plan.groups > 1 && (sums.loss != nullptr || sums.sums != nullptr)) {
    partial = allocate(pairs.first, {2, plan.groups}, ScalarType::Float);
    sums.partial = data<float>(partial), sums.parts = plan.groups;
  }
  params.sums = sums;
  params.counts = gradients || plan.groups == 1;
  launch_pair_loss(params, plan, device);
  if (plan.groups == 1) return;
  if (gradients) sums.known = sums.known == nullptr ? sums.scales : sums.known;
  launch_pair_finish(sums, device);
}

template <typename Params>
void set_pairs(Params& params, Pairs& pairs, const Options& options) {
  using T = typename Params::Element;
  params.a = pair_rows<const T>(pairs.first, 0);
  params.b = pair_rows<const T>(pairs.second, pairs.skip);
  params.smoothing = static_cast<float>(options.smoothing);
  params.rest = params.smoothing / static_cast<float>(pairs.classes);
  params.classes = pairs.classes;
  params.full = options.full;
}

void run_forward(Pairs& pairs, const Options& options, Results results, const Target& da, const Target& db,
                 const Device& device) {
  pairs.first = with_rows(pairs.first);
  pairs.second = pairs.skip > 0 ? pairs.first : with_rows(pairs.second);
  dispatch(check_dtype("logits", pairs.first), [&](auto type) {
    using T = typename decltype(type)::type;
    PairLoss<T> params{};
    set_pairs(params, pairs, options);
    params.da = da.template rows<T>();
    params.db = db.template rows<T>(pairs.skip);
    params.stats = results.stats;
    params.row_losses = results.row_losses;
    params.expected = static_cast<float>(results.expected);
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
                  std::optional<double> expected, const Target& da, const Target& db, const Device& device) {
  pairs.first = with_rows(pairs.first);
  pairs.second = pairs.skip > 0 ? pairs.first : with_rows(pairs.second);
  dispatch(check_dtype("logits", pairs.first), [&](auto type) {
    using T = typename decltype(type)::type;
    PairGrad<T> params{};
    set_pairs(params, pairs, options);
    params.da = da.template rows<T>();
    params.db = db.template rows<T>(pairs.skip);
    params.sums = sums_of(pairs, options, true);
    params.grad = per_row<float>(grad);
    params.stats = data<const float>(stats);
    params.scales = data<const float>(scales);
    if (expected.has_value()) params.one = params.grad.data, params.expected = static_cast<float>(*expected);
    launch_pair_grad(params, device);
  });
}

std::vector<int64_t> with_first(int64_t first, std::vector<int64_t> rest) {
  rest.insert(rest.begin(), first);
  return rest;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> consistency_forward(Tensor logits_a, Tensor logits_b, OptionalTensor mask,
                                                       bool detach_target, std::string reduction, double expected,
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
  Tensor scale = allocate(logits_a, {}, ScalarType::Float);
  Options options{1.0, 0.0, 0, !detach_target};
  Results results{sums_of(pairs, options, reduction == "batchmean"), data<float>(stats),
                  none ? data<float>(loss) : nullptr, expected};
  results.sums.scales = data<float>(scale);
  if (!none) results.sums.loss = data<float>(loss);
  Target to_a(da), to_b(db);
  DeviceScope scope(device);
  run_forward(pairs, options, results, to_a, to_b, device);
  to_a.put_back(), to_b.put_back();
  return {loss, stats, scale};
}

void consistency_backward(Tensor grad, Tensor logits_a, Tensor logits_b, OptionalTensor mask, Tensor stats,
                          Tensor scale, bool detach_target, OptionalTensor da, OptionalTensor db,
                          std::optional<double> expected) {
  Pairs pairs = check_pair(logits_a, logits_b, mask);
  std::vector<int64_t> leading = leading_sizes(logits_a);
  check_float("grad", grad, "logits_a", logits_a, "[], or one value a row",
              grad.dim() == 0 ? std::vector<int64_t>{} : leading);
  if (expected.has_value() && grad.dim() != 0) fail("grad", shape_text(grad), "[], as one gradient is expected");
  check_float("stats", stats, "logits_a", logits_a, "[4 or 6, ...]", with_first(detach_target ? 4 : 6, leading));
  check_float("scale", scale, "logits_a", logits_a, "[]", {});
  check_gradient("da", da, "logits_a", logits_a);
  check_gradient("db", db, "logits_a", logits_a);
  Device device = check_device("logits_a", logits_a);
  Target to_a(da), to_b(db);
  DeviceScope scope(device);
  stats = as_contiguous(stats);
  run_backward(pairs, {1.0, 0.0, 0, !detach_target}, grad, stats, scale, expected, to_a, to_b, device);
  to_a.put_back(), to_b.put_back();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adamix_forward(Tensor logits, Tensor labels, OptionalTensor mask,
                                                                  OptionalTensor num_items, double weight,
                                                                  int64_t ignore_index, double label_smoothing,
                                                                  bool detach_target, double expected,
                                                                  OptionalTensor d_logits) {
  Pairs pairs = check_doubled(logits, labels, mask, num_items);
  check_gradient("d_logits", d_logits, "logits", logits);
  Device device = check_device("logits", logits);

  Tensor stats = allocate(logits, with_first(detach_target ? 2 : 3, leading_sizes(logits)), ScalarType::Float);
  auto scalar = [&] { return allocate(logits, {}, ScalarType::Float); };
  Tensor loss = scalar(), cross_entropy = scalar(), consistency = scalar();
  Tensor scales = allocate(logits, {2}, ScalarType::Float);
  Options options{weight, label_smoothing, ignore_index, !detach_target};
  Results results{sums_of(pairs, options, true), data<float>(stats), nullptr, expected};
  results.sums.scales = data<float>(scales);
  results.sums.loss = data<float>(loss), results.sums.cross_entropy = data<float>(cross_entropy);
  results.sums.consistency = data<float>(consistency);
  Target to(d_logits);
  DeviceScope scope(device);
  run_forward(pairs, options, results, to, to, device);
  to.put_back();
  return {loss, cross_entropy, consistency, stats, scales};
}

void adamix_backward(Tensor grad, Tensor logits, Tensor labels, OptionalTensor mask, Tensor stats, Tensor scales,
                     double weight, int64_t ignore_index, double label_smoothing, bool detach_target, Tensor d_logits,
                     std::optional<double> expected) {
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
  run_backward(pairs, {weight, label_smoothing, ignore_index, !detach_target}, grad, stats, scales, expected, to, to,
               device);
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
  Results results{sums_of(pairs, options, true), nullptr, nullptr, 1.0};
  results.sums.known = data<const float>(factors);
  results.sums.sums = data<float>(sums);
  Target to(need_grad ? OptionalTensor(logits) : std::nullopt);
  DeviceScope scope(device);
  run_forward(pairs, options, results, to, to, device);
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
  return {plan.lanes, plan.threads, plan.cluster, plan.slots, plan.groups};
}

}  // namespace adamix
