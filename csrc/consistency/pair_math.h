// One row pair: softmax statistics in one read, its losses, its gradients.
#pragma once

#include "consistency/consistency.h"

namespace adamix {

ADAMIX_DEVICE float negative_infinity() { return float_of_bits(0xff800000u); }

// The maximum to subtract: that of a row without a finite logit is 0, so that such rows become NaN and nothing else.
ADAMIX_DEVICE float finite_top(float top) { return top == negative_infinity() ? 0.f : top; }

// With ea = exp(a - max a) and c = (a - max a) - (b - max b): c differs from d by `center`, a constant of the row, and
// is of d's size, not of the logits'. Once the center is known the gaps are counted from it: E_p d and E_q d are then
// small where the passes are close, and J = 1/2 (E_p d - E_q d) adds up two numbers of one sign.
// Out of a row's range both logits are -inf.
struct PairStatistics {
  float top_a, top_b;  // maxima so far
  float sum_a, sum_b;  // sums of ea, of eb
  float gap_a, gap_b;  // sums of ea (c - center), of eb (c - center)
  float total;         // sum of a - max a
  float columns;       // in that sum
  float label;         // the label's logit, in the part of the row that has it
  float center;        // 0, or what center_of gives

  ADAMIX_DEVICE void clear() {
    top_a = top_b = negative_infinity();
    sum_a = sum_b = gap_a = gap_b = total = columns = label = center = 0.f;
  }

  // The same sums for larger maxima.
  ADAMIX_DEVICE void move_to(float new_a, float new_b) {
    float rise_a = finite_top(new_a) - finite_top(top_a), rise_b = finite_top(new_b) - finite_top(top_b);
    float decay_a = expf(top_a - finite_top(new_a)), decay_b = expf(top_b - finite_top(new_b));
    // A weight of 0 takes nothing along, not even an infinite c.
    gap_a = decay_a == 0.f ? 0.f : (gap_a - sum_a * (rise_a - rise_b)) * decay_a;
    gap_b = decay_b == 0.f ? 0.f : (gap_b - sum_b * (rise_a - rise_b)) * decay_b;
    sum_a *= decay_a, sum_b *= decay_b;
    total -= columns * rise_a;
    top_a = new_a, top_b = new_b;
  }

  // d - c, from the sums of the whole row.
  static ADAMIX_DEVICE float center_of(float sum_a, float sum_b) {
    return sum_a > 0.f && sum_b > 0.f ? logf(sum_a) - logf(sum_b) : 0.f;
  }

  // Columns [begin, end) of x and y lie within the row.
  template <int Count>
  ADAMIX_DEVICE void add(const float (&x)[Count], const float (&y)[Count], int begin, int end) {
    float new_a = top_a, new_b = top_b;
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      new_a = x[e] > new_a || x[e] != x[e] ? x[e] : new_a;
      new_b = y[e] > new_b || y[e] != y[e] ? y[e] : new_b;
    }
    if (!(new_a == top_a && new_b == top_b)) move_to(new_a, new_b);
    new_a = finite_top(new_a), new_b = finite_top(new_b);
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      float u = x[e] - new_a, v = y[e] - new_b;
      float ea = expf(u), eb = expf(v);
      // -inf in both is a class that neither can choose; -inf in one alone must not meet a weight of 0.
      float c = u == v ? 0.f : u - v;
      gap_a += ea == 0.f ? 0.f : ea * c;
      gap_b += eb == 0.f ? 0.f : eb * c;
      sum_a += ea, sum_b += eb;
      if (e >= begin && e < end) total += u;
    }
    columns += static_cast<float>(end - begin);
  }
};

struct PairScales {
  float entropy, pair;  // of the cross-entropy, and of J
};

// What both parts of a row's gradient are multiplied by, and what was taken out of both.
struct PairShares {
  float entropy, pair, factor;
};

ADAMIX_DEVICE PairShares shares_of(const PairSums& sums, PairScales scales) {
  PairShares shares{sums.labels.data == nullptr ? 0.f : scales.entropy, scales.pair * sums.weight, 1.f};
  if (sums.held) {
    shares.factor = shares.entropy > shares.pair ? shares.entropy : shares.pair;
    float over = shares.factor > 0.f ? shares.factor : 1.f;
    shares.entropy /= over, shares.pair /= over;
  }
  return shares;
}

// Whether and how a row counts.
struct PairFlags {
  int label;      // -1: out of range
  bool counted;   // it has a cross-entropy
  bool selected;  // it has a J
};

ADAMIX_DEVICE PairFlags flags_of(const PairSums& sums, int row, int classes) {
  PairFlags flags{-1, false, row < sums.rows};
  if (!flags.selected) return flags;
  if (sums.labels.data != nullptr) {
    int64_t at = sums.labels.offset(row);
    int64_t label = sums.wide_labels ? static_cast<const int64_t*>(sums.labels.data)[at]
                                     : static_cast<const int32_t*>(sums.labels.data)[at];
    flags.label = label >= 0 && label < classes ? static_cast<int>(label) : -1;
    flags.counted = flags.selected = label != sums.ignore_index;
  }
  if (sums.mask.data != nullptr) {
    flags.selected = sums.mask.data[sums.mask.offset(row)] != 0;
    flags.counted = flags.counted && flags.selected;
  }
  return flags;
}

// A row's losses, and what its gradient needs.
struct PairResult {
  float top_a, top_b, log_a, log_b, mean_p, mean_q;
  float entropy, pair;  // 0 where they do not count
};

ADAMIX_DEVICE PairResult result_of(const PairStatistics& s, const PairFlags& flags, int classes, float smoothing) {
  if (!flags.selected) return {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  PairResult r{finite_top(s.top_a), finite_top(s.top_b), logf(s.sum_a), logf(s.sum_b),
               s.gap_a / s.sum_a,   s.gap_b / s.sum_b,   0.f,           0.f};
  r.pair = 0.5f * (r.mean_p - r.mean_q);
  if (flags.counted) {
    r.entropy = flags.label < 0 ? not_a_number() : r.log_a - (s.label - r.top_a);
    if (smoothing > 0.f) {
      r.entropy = (1.f - smoothing) * r.entropy + smoothing * (r.log_a - s.total / static_cast<float>(classes));
    }
  }
  return r;
}

// One column: p and q, p - q, d.
struct PairPoint {
  float p, q, gap, d;
};

ADAMIX_DEVICE PairPoint point_of(const PairResult& r, float x, float y) {
  x = x - r.top_a - r.log_a, y = y - r.top_b - r.log_b;
  PairPoint at{expf(x), expf(y), 0.f, x == y ? 0.f : x - y};
  at.gap = at.p - at.q;
  return at;
}

// E_p d and E_q d once more, as slope_of needs them: of its own d, whose rounding is large where the logits are, and
// with the sum of p - q, which is rounding alone. A row's gradient then sums to 0 also where its parts cancel.
struct PairMeans {
  float values[2];

  ADAMIX_DEVICE void add(const PairResult& r, float x, float y) {
    PairPoint at = point_of(r, x, y);
    values[0] += (at.p == 0.f ? 0.f : at.p * at.d) + at.gap;
    values[1] += (at.q == 0.f ? 0.f : at.q * at.d) + at.gap;
  }
};

// Both gradients of one column.
struct PairSlope {
  float a, b;
};

// entropy: the cross-entropy's coefficient, half: half of J's; target: what the cross-entropy wants p to be.
ADAMIX_DEVICE PairSlope slope_of(const PairResult& r, float x, float y, float entropy, float half, float target,
                                 bool full) {
  PairPoint at = point_of(r, x, y);
  PairSlope slope{half * at.gap, 0.f};
  slope.b = -slope.a;
  if (full) {
    slope.a = half * (at.p * (at.d - r.mean_p) + at.gap);
    slope.b = -half * (at.q * (at.d - r.mean_q) + at.gap);
  }
  if (entropy != 0.f) slope.a += entropy * (at.p - target);
  return slope;
}

}  // namespace adamix
