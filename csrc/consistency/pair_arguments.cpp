#include "consistency/pair_arguments.h"

#include "common/scalar_checks.h"
#include "consistency/row_tensors.h"

namespace adamix {

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

static void check_mask(const OptionalTensor& mask, const std::vector<int64_t>& leading, const char* like_name,
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

}  // namespace adamix
