#include "common/lora_checks.h"

#include <algorithm>

namespace adamix {
namespace {

std::string text(const std::vector<int64_t>& values) {
  std::string joined;
  for (int64_t value : values) joined += (joined.empty() ? "" : ", ") + std::to_string(value);
  return "(" + joined + ")";
}

}  // namespace

ColumnRanges check_ranges(const std::vector<int64_t>& offsets, int64_t groups, int64_t cols, int64_t width) {
  if (static_cast<int64_t>(offsets.size()) != groups) {
    fail("offsets", text(offsets), std::to_string(groups) + " of them, one for each group");
  }
  ColumnRanges ranges{};
  ranges.groups = static_cast<int>(groups);
  ranges.cols = check_int("Ng", cols);
  int64_t end = 0;  // of the ranges before
  std::vector<int64_t> sorted(offsets);
  std::sort(sorted.begin(), sorted.end());
  for (int64_t start : sorted) {
    check_int("offsets", start);
    if (start < 0) fail("offsets", text(offsets), "offsets of at least 0");
    if (start < end) fail("offsets", text(offsets), "ranges of Ng = " + std::to_string(cols) + " that do not overlap");
    if (start > end) {
      ranges.gap_start[ranges.gaps] = static_cast<int>(end);
      ranges.gap_cols[ranges.gaps++] = static_cast<int>(start - end);
    }
    end = start + cols;
  }
  if (width >= 0 && end > width) fail("offsets", text(offsets), "ranges within " + std::to_string(width) + " columns");
  check_int("N", std::max(end, width));
  if (end < width) {
    ranges.gap_start[ranges.gaps] = static_cast<int>(end);
    ranges.gap_cols[ranges.gaps++] = static_cast<int>(width - end);
  }
  std::transform(offsets.begin(), offsets.end(), ranges.start, [](int64_t start) { return static_cast<int>(start); });
  return ranges;
}

Dropout check_dropout(const OptionalTensor& seed, double p, const Tensor& x) {
  if (!(p >= 0 && p < 1)) fail("dropout_p", std::to_string(p), "a probability, 0 <= dropout_p < 1");
  if (!seed.has_value()) {
    if (p > 0) fail("seed", "none", "a seed, as dropout_p is " + std::to_string(p));
    return {nullptr, 0, 1.f};
  }
  if (seed->scalar_type() != ScalarType::Long) {
    fail("seed", torch::headeronly::toString(seed->scalar_type()), "Long");
  }
  check_sizes("seed", *seed, "[]", {});
  if (!is_beside(*seed, x)) fail("seed", "another device", "the device of x");
  return {data<const int64_t>(*seed), static_cast<uint32_t>(p * 4294967296.0), static_cast<float>(1 / (1 - p))};
}

}  // namespace adamix
