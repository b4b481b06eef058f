// One row pair: softmax statistics, its losses, its gradients.
#pragma once

#include "consistency/consistency.h"
#include "consistency/pair_piece.h"
#include "consistency/pair_powers.h"

namespace adamix {

// The maximum to subtract: that of a row without a finite logit is 0, so that such rows become NaN and nothing else.
ADAMIX_DEVICE float finite_top(float top) { return top == negative_infinity() ? 0.f : top; }

// Of gaps, where a million of them of 1e38 each must not add up to inf.
constexpr float kSmall = 9.5367431640625e-7f;  // 2^-20

// With u = a - max a, v = b - max b and c = u - v: c differs from d by `center`, a constant of the row, and is of d's
// size, not of the logits'. Once the center is known the gaps are counted from it: E_p d and E_q d are then small where
// the passes are close, and J = 1/2 (E_p d - E_q d) adds up two numbers of one sign.
struct PairStatistics {
  float top_a, top_b;  // what is subtracted
  float sum_a, sum_b;  // of e^u, of e^v
  float gap_a, gap_b;  // of e^u (c - center), of e^v (c - center), times kSmall
  float total;         // of u
  float label;         // the label's logit, in the part of the row that has it
  float center;        // 0, or d - c as far as these sums tell
  float lean;          // of e^u - e^v, for the full gradient

  ADAMIX_DEVICE void start(float a, float b) {
    top_a = a, top_b = b;
    sum_a = sum_b = gap_a = gap_b = total = label = center = lean = 0.f;
  }

  // The same sums of `columns` columns for larger maxima, before there is a center.
  ADAMIX_DEVICE void move_to(float new_a, float new_b, float columns) {
    float rise_a = finite_top(new_a) - finite_top(top_a), rise_b = finite_top(new_b) - finite_top(top_b);
    float decay_a = expf(top_a - finite_top(new_a)), decay_b = expf(top_b - finite_top(new_b));
    // A weight of 0 takes nothing along, not even an infinite c.
    float rise = (rise_a - rise_b) * kSmall;
    gap_a = decay_a == 0.f ? 0.f : (gap_a - sum_a * rise) * decay_a;
    gap_b = decay_b == 0.f ? 0.f : (gap_b - sum_b * rise) * decay_b;
    sum_a = decay_a == 0.f ? 0.f : sum_a * decay_a, sum_b = decay_b == 0.f ? 0.f : sum_b * decay_b;
    total -= columns * rise_a;
    top_a = new_a, top_b = new_b;
  }

  // Columns [begin, end) of both pieces lie within the row, elsewhere both are -inf. Careful: a piece may hold -inf, or
  // a logit of 1e38; otherwise one makes a gap NaN or infinite, and lift() comes before and back() after.
  template <bool Full, bool Careful, typename T>
  ADAMIX_DEVICE void add(const Piece<T>& a, const Piece<T>& b, bool totals = false, int begin = 0, int end = 0) {
    float x = Careful ? finite_top(top_a) : top_a, y = Careful ? finite_top(top_b) : top_b;
    float u[Piece<T>::kSize], w[Piece<T>::kSize];
#pragma unroll
    for (int e = 0; e < Piece<T>::kSize; e += 2) get_two(a, e, u[e], u[e + 1]), get_two(b, e, w[e], w[e + 1]);
#pragma unroll
    for (int e = 0; e < Piece<T>::kSize; ++e) {
      u[e] -= x;
      float v = w[e] - y, p = exp_of<T>(u[e]), q = exp_of<T>(v), c = u[e] - v;
      sum_a += p, sum_b += q;
      if constexpr (Full) lean += p - q;
      if constexpr (Careful) {
        // -inf in both is a class that neither can choose; -inf in one alone must not meet a weight of 0.
        c = u[e] == v ? 0.f : c * kSmall;
        gap_a += p == 0.f ? 0.f : p * c;
        gap_b += q == 0.f ? 0.f : q * c;
      } else {
        gap_a = fmaf(p, c, gap_a), gap_b = fmaf(q, c, gap_b);
      }
    }
    if constexpr (Careful) {
      if (!totals) return;
#pragma unroll
      for (int e = 0; e < Piece<T>::kSize; ++e) {
        if (e >= begin && e < end) total += u[e];
      }
    }
  }

  // What add() leaves out of a whole piece where it is not careful: seldom asked for.
  template <typename T>
  ADAMIX_DEVICE void add_total(const Piece<T>& a) {
#pragma unroll
    for (int e = 0; e < Piece<T>::kSize; ++e) total += to_float(a.values[e]) - top_a;
  }

  // The same of whole pieces of 16-bit logits for the constant targets' gradient, with 4 instructions less a column, in
  // sums that are lifted: lift() comes before them, and back() after. Rows that may not be lifted come out as NaN.
  template <typename T>
  ADAMIX_DEVICE void add_lifted(const Lifted& a, const Lifted& b, const Piece<T>& xs, const Piece<T>& ys) {
#pragma unroll
    for (int e = 0; e < Piece<T>::kSize; e += 2) {
      float x[2], y[2];
      get_two(xs, e, x[0], x[1]), get_two(ys, e, y[0], y[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float u = a.power(x[i]), v = b.power(y[i]), p = power_of_2(u), q = power_of_2(v), c = u - v;
        sum_a += p, sum_b += q;
        gap_a = fmaf(p, c, gap_a), gap_b = fmaf(q, c, gap_b);
      }
    }
  }
  ADAMIX_DEVICE void lift(const Lifted& a, const Lifted& b) {
    float of_a = power_of_2(a.slip), of_b = power_of_2(b.slip);
    sum_a *= of_a, sum_b *= of_b, gap_a *= of_a * (kLog2E / kSmall), gap_b *= of_b * (kLog2E / kSmall);
  }
  ADAMIX_DEVICE void back(const Lifted& a, const Lifted& b) {
    float of_a = a.rest(), of_b = b.rest();
    sum_a *= of_a, sum_b *= of_b, gap_a *= of_a * (kLn2 * kSmall), gap_b *= of_b * (kLn2 * kSmall);
    // Powers so far off may have lost what is multiplied.
    if (!(fabsf(a.slip) + fabsf(b.slip) < 64.f)) gap_a = not_a_number();
  }
  // The gaps alone, for add().
  ADAMIX_DEVICE void lift() { gap_a /= kSmall, gap_b /= kSmall; }
  ADAMIX_DEVICE void back() { gap_a *= kSmall, gap_b *= kSmall; }

  // d - c; each part of a row has its own, and the whole row the true one.
  ADAMIX_DEVICE float center_of_sums() const { return sum_a > 0.f && sum_b > 0.f ? logf(sum_a) - logf(sum_b) : 0.f; }

  ADAMIX_DEVICE bool finite() const { return fabsf(gap_a) + fabsf(gap_b) < -negative_infinity(); }
};

// J's coefficient below which q has no part in the gradient: no element of a row reaches 2^-120 then.
constexpr float kLeastCoefficient = 7.52316384526264e-37f;  // 2^-120

// About d - c, for what is counted from anew: the row's own center comes after.
ADAMIX_DEVICE float rough_center(float sum_a, float sum_b) {
  return sum_a > 0.f && sum_b > 0.f ? kLn2 * (power_of(sum_a) - power_of(sum_b)) : 0.f;
}

struct PairScales {
  float entropy, pair;  // of the cross-entropy, and of J
};

// What both parts of a row's gradient are multiplied by, for an incoming one of `grad`.
ADAMIX_DEVICE PairScales shares_of(const PairSums& sums, PairScales scales, float grad) {
  return {sums.labels.data == nullptr ? 0.f : grad * scales.entropy, grad * scales.pair * sums.weight};
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
  float top_a, top_b, log_a, log_b;
  // E_p d and E_q d, and the sum of p - q, which is rounding alone: a row's gradient then sums to 0 also where its
  // parts cancel.
  float mean_p, mean_q;
  float entropy, pair;  // 0 where they do not count
};

ADAMIX_DEVICE PairResult result_of(const PairStatistics& s, const PairFlags& flags, int classes, float smoothing) {
  if (!flags.selected) return {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  float log_a = logf(s.sum_a), log_b = logf(s.sum_b);
  float over_a = expf(-log_a), over_b = expf(-log_b);
  float mean_p = s.gap_a / s.sum_a / kSmall, mean_q = s.gap_b / s.sum_b / kSmall;
  float rounding = fmaf(over_a - over_b, s.sum_b, over_a * s.lean);
  PairResult r{finite_top(s.top_a), finite_top(s.top_b), log_a, log_b,
               mean_p + rounding,   mean_q + rounding,   0.f,   0.5f * (mean_p - mean_q)};
  if (flags.counted) {
    r.entropy = flags.label < 0 ? not_a_number() : r.log_a - (s.label - r.top_a);
    if (smoothing > 0.f) {
      r.entropy = (1.f - smoothing) * r.entropy + smoothing * (r.log_a - s.total / static_cast<float>(classes));
    }
  }
  return r;
}

// Both gradients of a row's columns.
//
// constant targets: 1/2 (p - q) and its opposite
// otherwise:        1/2 [p (d - E_p d) + p - q] and -1/2 [q (d - E_q d) + p - q]
// times J's coefficient, with the cross-entropy's times p less its target in the first one.
struct alignas(16) PairSlopes {
  // Of 16-bit logits and constant targets: the powers' lifts, of b with half_q in it, NaN where a row may not be
  // lifted; all_p and half_p, which make good what the lifts' rounding leaves.
  float lift_a, lift_b, lifted_all, lifted_p;
  float rest;        // of the cross-entropy's target, what every class has, times that coefficient
  float next_label;  // the next row's label's logit, where this block has it; else 0
  float top_a, top_b;
  float over_a, over_b;         // one over the sums of e^u, of e^v
  float entropy, half;          // coefficients of the cross-entropy, and half of J's
  float all_p, half_p, half_q;  // both together, and J's, over the sums
  float mean_p, mean_q;         // of c, not of d

  PairSlopes() = default;
  // entropy, pair: the coefficients of both parts; rest: smoothing / classes.
  ADAMIX_DEVICE PairSlopes(const PairResult& r, float entropy_, float pair, float rest_)
      : rest(entropy_ * rest_),
        next_label(0.f),
        top_a(r.top_a),
        top_b(r.top_b),
        over_a(expf(-r.log_a)),
        over_b(expf(-r.log_b)),
        entropy(entropy_),
        half(0.5f * pair) {
    half_p = half * over_a, half_q = half * over_b, all_p = fmaf(entropy, over_a, half_p);
    mean_p = r.mean_p + (r.log_a - r.log_b), mean_q = r.mean_q + (r.log_a - r.log_b);
    lift();
  }

  // For the full gradient: half_p and half_q, each rounded by itself, leave something of a row's sum, which the means
  // take, as that of over_a and over_b (result_of).
  ADAMIX_DEVICE void settle() {
    if (half == 0.f) return;
    float left = (fmaf(half, over_b, -half_q) / over_b - fmaf(half, over_a, -half_p) / over_a) / half;
    mean_p += left, mean_q += left;
  }

  // q's coefficient becomes a part of its power, and p's makes good what that has rounded.
  ADAMIX_DEVICE void lift() {
    Lifted a(top_a), b(top_b);
    float mend = a.rest(), slip = b.slip;
    lift_b = -negative_infinity();
    if (half_q >= kLeastCoefficient) {
      float power = power_of(half_q);
      lift_b = b.lift - power;
      float taken = b.lift - lift_b;
      slip += (taken - power) + (b.lift - (lift_b + taken));  // the difference's rounding
      mend = power_of_2(slip - a.slip) * power_of_2(power) / half_q;
    }
    lift_a = may_be_lifted(a.slip) && may_be_lifted(slip) && half_q >= 0.f ? a.lift : not_a_number();
    lifted_all = all_p * mend, lifted_p = half_p * mend;
  }
  ADAMIX_DEVICE bool lifted() const { return lift_a == lift_a; }

  // Of one column that is not the label's. Careful: both logits may be -inf. Rest: `rest` may not be 0.
  template <typename T, bool Full, bool Careful, bool Rest>
  ADAMIX_DEVICE void column(float x, float y, float& da, float& db) const {
    float u = x - top_a, v = y - top_b, p = exp_of<T>(u), q = exp_of<T>(v);
    if constexpr (Full) {
      float c = Careful && u == v ? 0.f : u - v, share_p = half_p * p, share_q = half_q * q, gap = share_p - share_q;
      da = fmaf(entropy * over_a, p, fmaf(share_p, c - mean_p, gap)), db = fmaf(-share_q, c - mean_q, -gap);
      if constexpr (Rest) da -= rest;
    } else {
      da = fmaf(all_p, p, -fmaf(half_q, q, rest)), db = fmaf(-half_p, p, half_q * q);
    }
  }

  // The first gradient of the label's column, whose target is `target`: 0 where p is the target and q.
  template <typename T, bool Full>
  ADAMIX_DEVICE float label(float x, float y, float target) const {
    float u = x - top_a, v = y - top_b, p = over_a * exp_of<T>(u), gap = p - over_b * exp_of<T>(v);
    if constexpr (Full) gap = fmaf(p, (u == v ? 0.f : u - v) - mean_p, gap);
    return entropy == 0.f ? half * gap : fmaf(entropy, p - target, half * gap);
  }

  // Of a piece's columns, in the place of its logits.
  template <bool Full, bool Careful, bool Rest = true, typename T>
  ADAMIX_DEVICE void piece(Piece<T>& a, Piece<T>& b) const {
#pragma unroll
    for (int e = 0; e < Piece<T>::kSize; e += 2) {
      float x[2], y[2], da[2], db[2];
      get_two(a, e, x[0], x[1]), get_two(b, e, y[0], y[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) column<T, Full, Careful, Rest>(x[i], y[i], da[i], db[i]);
      set_two(a, e, da[0], da[1]), set_two(b, e, db[0], db[1]);
    }
  }

  // The same of a whole piece, for constant targets, where lifted().
  template <bool Rest, typename T>
  ADAMIX_DEVICE void lifted_piece(Piece<T>& xs, Piece<T>& ys) const {
#pragma unroll
    for (int e = 0; e < Piece<T>::kSize; e += 2) {
      float x[2], y[2], da[2], db[2];
      get_two(xs, e, x[0], x[1]), get_two(ys, e, y[0], y[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float p = power_of_2(fmaf(x[i], kLog2E, -lift_a)), q = power_of_2(fmaf(y[i], kLog2E, -lift_b));
        da[i] = fmaf(lifted_all, p, Rest ? -(q + rest) : -q), db[i] = fmaf(-lifted_p, p, q);
      }
      set_two(xs, e, da[0], da[1]), set_two(ys, e, db[0], db[1]);
    }
  }
};

}  // namespace adamix
