"""A row pair of many classes, by lanes: each lane of a program keeps its own statistics, of every so many columns.

A tile is [lanes, 16 bytes of columns]. `exact` works in natural units, as PyTorch does; else in powers of two, with one
multiply-add where `exact` has two roundings, without a thought for -inf in both passes, for maxima beyond 1e8 or for
columns far above a lane's first ones: `join` says where a row needs `exact`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import INTERPRETING
from .pieces import SMALL, finite_top, pinned

# In float32.
LOG2E = tl.constexpr(1.4426950216293335)
LN2 = tl.constexpr(0.6931471805599453)

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def fused(x, y, z):
    """x y + z with one rounding, which the interpreter's own has not."""
    if _INTERPRETING:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def powers(top):
    """top in powers of two, rounded once: the maximum keeps the product from becoming half of a multiply-add."""
    return tl.maximum(top * LOG2E, -3e38)


@triton.jit
def lane_tops(first, label):
    """What a lane's sums are in powers of unless EXACT: the maximum of its first columns [lanes, n] and of the label's
    logit (NaN: there is none), so that it is a row's maximum where that is the label's. Its later columns may exceed
    it, up to where `join` sees that they are too large."""
    label = tl.where(label == label, label, -float("inf"))  # the interpreter's maximum would be NaN
    return finite_top(tl.maximum(tl.max(first, axis=1), label))


@triton.jit
def fold(
    x, y, here, top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count,
    EXACT: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Takes one tile x, y in: -inf where not `here`, or None for everywhere.

    A lane's state: maxima, or `lane_tops` throughout; the same in powers of two; sums of ea, eb, ea c, eb c, with
    ea = exp(a - top a) and c = (a - top a) - (b - top b), in powers of two, or SMALL times that if EXACT; sum and
    number of a - top a. c differs from d by a constant and is of d's size, not of the logits', which is what keeps
    J = 1/2 (E_p c - E_q c) exact.
    """
    x = x.to(tl.float32)
    y = y.to(tl.float32)
    if EXACT:
        top_before_a = top_a
        top_before_b = top_b
        top_a = tl.maximum(top_a, tl.max(x, axis=1))
        top_b = tl.maximum(top_b, tl.max(y, axis=1))
        to_a = finite_top(top_a)
        to_b = finite_top(top_b)
        x -= to_a[:, None]
        y -= to_b[:, None]
        ea = tl.exp(x)
        eb = tl.exp(y)
        keep_a = tl.exp(top_before_a - to_a)
        keep_b = tl.exp(top_before_b - to_b)
        # -inf in both is a class neither can choose; -inf in one alone must not meet a weight of 0.
        c = tl.where(x == y, 0.0, (x - y) * SMALL)
        more_a = tl.where(ea == 0, 0.0, ea * c)
        more_b = tl.where(eb == 0, 0.0, eb * c)
        shift = ((to_a - low_a) - (to_b - low_b)) * SMALL
        gap_a = (gap_a - sum_a * shift) * keep_a
        gap_b = (gap_b - sum_b * shift) * keep_b
        sum_a *= keep_a
        sum_b *= keep_b
        if SMOOTH:
            total -= count * (to_a - low_a)
        low_a = to_a
        low_b = to_b
    else:
        x = fused(x, LOG2E, -low_a[:, None])
        y = fused(y, LOG2E, -low_b[:, None])
        ea = tl.exp2(x)
        eb = tl.exp2(y)
        c = x - y
        if here is not None:
            c = tl.where(here, c, 0.0)
        more_a = ea * c
        more_b = eb * c
    gap_a += tl.sum(more_a, axis=1)
    gap_b += tl.sum(more_b, axis=1)
    sum_a += tl.sum(ea, axis=1)
    sum_b += tl.sum(eb, axis=1)
    if SMOOTH:
        if here is not None:
            x = tl.where(here, x, 0.0)
            count += tl.sum(tl.broadcast_to(here, x.shape).to(tl.float32), axis=1)
        else:
            count += x.shape[1]
        total += tl.sum(x, axis=1)
    return top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count


@triton.jit
def _sums(a, b, c, d):
    """Sums over lanes, as of one tensor: every tl.max or tl.sum over warps takes a register throughout the kernel."""
    if _INTERPRETING:
        # NumPy adds along a last axis alone by halves.
        return tl.sum(a, axis=0), tl.sum(b, axis=0), tl.sum(c, axis=0), tl.sum(d, axis=0)
    else:
        first, second = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=0))
        sum_a, sum_b = tl.split(first)
        sum_c, sum_d = tl.split(second)
        return sum_a, sum_b, sum_c, sum_d


@triton.jit
def join(
    top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count, V, EXACT: tl.constexpr, SMOOTH: tl.constexpr
):  # fmt: skip
    """A row's (tops, logs of the sums, E_p d, E_q d, J, sum of a - top a, whether that is to be trusted); its tops are
    the largest of its lanes'."""
    max_a, max_b = tl.split(tl.max(tl.join(top_a, top_b), axis=0))
    if EXACT:
        max_a = finite_top(max_a)
        max_b = finite_top(max_b)
        over_a = low_a - max_a
        over_b = low_b - max_b
        keep_a = tl.exp(top_a - max_a)
        keep_b = tl.exp(top_b - max_b)
        shift = (over_a - over_b) * SMALL
    else:
        over_a = low_a - powers(max_a)
        over_b = low_b - powers(max_b)
        # Half of it twice: a sum may be as large as what it is multiplied by is small, which a GPU's exp2 takes for 0.
        keep_a = tl.exp2(0.5 * over_a)
        keep_b = tl.exp2(0.5 * over_b)
        shift = over_a - over_b
    gap_a = (gap_a + sum_a * shift) * keep_a
    gap_b = (gap_b + sum_b * shift) * keep_b
    sum_a *= keep_a
    sum_b *= keep_b
    if not EXACT:
        gap_a *= keep_a
        gap_b *= keep_b
        sum_a *= keep_a
        sum_b *= keep_b
    sum_a, sum_b, gap_a, gap_b = _sums(sum_a, sum_b, gap_a, gap_b)
    mean_p = gap_a / sum_a
    mean_q = gap_b / sum_b
    if SMOOTH:
        total = tl.sum(total + count * over_a, axis=0)
    else:
        total = sum_a
    if EXACT:
        log_a = pinned(tl.log(sum_a))
        log_b = pinned(tl.log(sum_b))
        mean_p /= SMALL
        mean_q /= SMALL
        sound = max_a == max_a
    else:
        # What `powers` rounded off is in every term.
        more_a = fused(max_a, LOG2E, -powers(max_a))
        more_b = fused(max_b, LOG2E, -powers(max_b))
        log_a = pinned((tl.log2(sum_a) - more_a) * LN2)
        log_b = pinned((tl.log2(sum_b) - more_b) * LN2)
        mean_p = (mean_p - (more_a - more_b)) * LN2
        mean_q = (mean_q - (more_a - more_b)) * LN2
        total = (total - V * more_a) * LN2
        sound = (tl.abs(mean_p) < 1e38) & (tl.abs(mean_q) < 1e38) & plain(max_a, max_b)
        sound = sound & near_one(sum_a) & near_one(sum_b)
    pair = 0.5 * (mean_p - mean_q)
    return max_a, max_b, log_a, log_b, mean_p - (log_a - log_b), mean_q - (log_a - log_b), pair, total, sound


@triton.jit
def plain(top_a, top_b):
    """Whether a row's maxima can be told in powers of two: what rounding takes from them there is no large power."""
    return (tl.abs(top_a) < 1e8) & (tl.abs(top_b) < 1e8)


@triton.jit
def near_one(x):
    """Whether a row's sum may stand in a coefficient of its gradient, and its terms in another."""
    return (x > 2.0**-24) & (x < 2.0**80)


@triton.jit
def slopes(top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, FULL: tl.constexpr):
    """A row's coefficients for `lane_grads`: (maxima in powers of two, factors of ea in ga, of eb in ga, of ea in gb,
    then with FULL what c times them is added to)."""
    low_a = powers(top_a)
    low_b = powers(top_b)
    log_a = fused(log_a, LOG2E, fused(top_a, LOG2E, -low_a))
    log_b = fused(log_b, LOG2E, fused(top_b, LOG2E, -low_b))
    p = tl.exp2(-log_a)
    half_p = half * p
    half_q = half * tl.exp2(-log_b)
    all_p = (half + share) * p
    at_p = all_p
    at_q = half_q
    if FULL:
        at_p = fused(-half_p, mean_p + (log_a - log_b) * LN2, all_p)
        at_q = fused(half_q, mean_q + (log_a - log_b) * LN2, half_q)
    return low_a, low_b, half_p, half_q, at_p, at_q


@triton.jit
def lane_grads(x, y, low_a, low_b, half_p, half_q, at_p, at_q, flat, FULL: tl.constexpr, SMOOTH: tl.constexpr):
    """Gradients on a and b of one tile, without the label's own share; flat: what smoothing takes from all classes."""
    x = fused(x.to(tl.float32), LOG2E, -low_a)
    y = fused(y.to(tl.float32), LOG2E, -low_b)
    ea = tl.exp2(x)
    eb = tl.exp2(y)
    q = eb * half_q
    if FULL:
        c = tl.where(x == y, 0.0, x - y)
        gb = fused(eb, fused(c, -half_q * LN2, at_q), -(ea * half_p))
        ea *= fused(c, half_p * LN2, at_p)
        at_p = 1.0
    else:
        gb = fused(ea, -half_p, q)
    if SMOOTH:
        q += flat
    # Triton's own minus is 0 - q, and the product would be made twice.
    return fused(ea, at_p, q * -1.0), gb
