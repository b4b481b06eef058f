"""What the kernels share: which rows count, a row's losses and what is kept of it, gradients in natural units.

a and b are the two passes' logits, p and q their softmaxes, d = log p - log q. Maxima of rows without a finite
logit are 0, so that such rows become NaN and nothing else does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import exp

# Of differences of logits, where a million of them must not add up to inf.
SMALL = tl.constexpr(2.0**-20)


@triton.jit
def offsets(row, inner, outer_stride, inner_stride):
    """Where a row lies: rows are pairs (row // inner, row % inner)."""
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride


@triton.jit
def row_flags(labels, mask, row, live, inner, l_outer, l_inner, m_outer, m_inner, ignore_index):
    """(label, whether the row has a cross-entropy, whether it has a consistency)."""
    label = (row * 0).to(tl.int64)
    counted = live & (row < 0)
    selected = live
    if labels is not None:
        at = labels + offsets(row, inner, l_outer, l_inner)
        label = tl.load(at, mask=live, other=0).to(tl.int64)
        counted = live & (label != ignore_index)
        selected = counted
    if mask is not None:
        selected = live & (tl.load(mask + offsets(row, inner, m_outer, m_inner), mask=live, other=0) != 0)
        counted = counted & selected
    return label, counted, selected


@triton.jit
def finite_top(top):
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def pinned(x):
    """x, a product that no compiler makes part of a multiply-add: the backward reads it from memory, rounded."""
    return tl.minimum(x, 3e38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def label_logit(a, at_a, label, counted, V):
    """NaN for a label out of range, which reads nothing."""
    known = counted & (label >= 0) & (label < V)
    return tl.load(a + at_a + label, mask=known, other=float("nan")).to(tl.float32)


@triton.jit
def row_losses(
    logit, counted, selected, top_a, log_a, pair, total, V, smoothing, ENTROPY: tl.constexpr, SMOOTH: tl.constexpr
):  # fmt: skip
    """(cross-entropy, J) of each row, 0 where they do not count.

    logit: of the label; top_a, log_a: a's maximum and the log of its sum of exp(a - top_a); total: sum of a - top_a.
    """
    pair = tl.where(selected, pair, 0.0)
    entropy = pair
    if ENTROPY:
        entropy = log_a - (logit - top_a)
        if SMOOTH:
            entropy = (1.0 - smoothing) * entropy + smoothing * (log_a - total / V)
        entropy = tl.where(counted, entropy, 0.0)
    return entropy, pair


@triton.jit
def store_row(
    stats, rows, row, live, n, top_a, top_b, log_a, log_b, mean_p, mean_q, entropy, pair,
    ENTROPY: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """stats [4 or 6, n]: maxima, logs of sums, means of d; rows [2, n]: both losses, or [n]: J alone."""
    if stats is not None:
        at = stats + row.to(tl.int64)
        step = tl.cast(n, tl.int64)
        tl.store(at, top_a, mask=live)
        tl.store(at + step, top_b, mask=live)
        tl.store(at + 2 * step, log_a, mask=live)
        tl.store(at + 3 * step, log_b, mask=live)
        if FULL:
            tl.store(at + 4 * step, mean_p, mask=live)
            tl.store(at + 5 * step, mean_q, mask=live)
    if rows is not None:
        if ENTROPY:
            tl.store(rows + row, entropy, mask=live)
            tl.store(rows + n + row, pair, mask=live)
        else:
            tl.store(rows + row, pair, mask=live)


@triton.jit
def load_row(stats, row, here, n, FULL: tl.constexpr):
    """What store_row kept: (top_a, top_b, log_a, log_b, mean_p, mean_q), the means 0 unless FULL."""
    at = stats + row.to(tl.int64)
    step = tl.cast(n, tl.int64)
    top_a = tl.load(at, mask=here, other=0.0)
    top_b = tl.load(at + step, mask=here, other=0.0)
    log_a = tl.load(at + 2 * step, mask=here, other=0.0)
    log_b = tl.load(at + 3 * step, mask=here, other=0.0)
    mean_p = top_a * 0.0
    mean_q = mean_p
    if FULL:
        mean_p = tl.load(at + 4 * step, mask=here, other=0.0)
        mean_q = tl.load(at + 5 * step, mask=here, other=0.0)
    return top_a, top_b, log_a, log_b, mean_p, mean_q


@triton.jit
def point(x, y, top_a, top_b, log_a, log_b, FULL: tl.constexpr):
    """(p, q, p - q, d) of a tile. FULL: p (d - E_p d) cancels over a row and p's error does not: to two spacings."""
    x = x - top_a - log_a
    y = y - top_b - log_b
    p = exp(x) if FULL else tl.exp(x)
    q = exp(y) if FULL else tl.exp(y)
    return p, q, p - q, tl.where(x == y, 0.0, x - y)


@triton.jit
def means(p, q, gap, d, here):
    """Terms of E_p d and E_q d once more, as pair_grads needs them, of its own d, whose rounding is large where the
    logits are; with those of the sum of p - q, which is rounding alone: a row's gradient then sums to 0 also where its
    parts cancel."""
    mean_p = tl.where(p == 0, 0.0, p * d) + gap
    mean_q = tl.where(q == 0, 0.0, q * d) + gap
    if here is not None:
        mean_p = tl.where(here, mean_p, 0.0)
        mean_q = tl.where(here, mean_q, 0.0)
    return mean_p, mean_q


@triton.jit
def pair_grads(
    p, q, gap, d, share, half, mean_p, mean_q, flat, ENTROPY: tl.constexpr, FULL: tl.constexpr, SMOOTH: tl.constexpr
):  # fmt: skip
    """Gradients on a and b of one tile, without the label's own share.

    share, half: coefficient of the cross-entropy, and half of J's; flat: what smoothing takes from every class.
    """
    if FULL:
        ga = half * (p * (d - mean_p) + gap)
        gb = -half * (q * (d - mean_q) + gap)
    else:
        ga = half * gap
        gb = -ga
    if ENTROPY:
        # Of two products that are added, either could be part of a multiply-add.
        ga = tl.fma(p, share, ga)
        if SMOOTH:
            ga -= flat
    return ga, gb
