"""What the kernels share: which rows count, softmax statistics in one read, a row's losses and gradients.

a and b are the two passes' logits, p and q their softmaxes, d = log p - log q. Maxima of rows without a finite
logit are 0, so that such rows become NaN and nothing else does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import exp, narrow


@triton.jit
def offsets(row, inner, outer_stride, inner_stride):
    """Where a row lies: rows are pairs (row // inner, row % inner)."""
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride


@triton.jit
def row_flags(labels, mask, row, live, inner, l_outer, l_inner, m_outer, m_inner, ignore_index):
    """(label, whether the row has a cross-entropy, whether it has a consistency)."""
    label = tl.zeros_like(row).to(tl.int64)
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
def statistics(
    a, b, at_a, at_b, selected, begin, end, V, SMOOTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Over columns begin : min(end, V), both multiples of COLS, of rows at_a and at_b, each [ROWS].

    Returns (max a, max b, sums of ea, eb, ea c, eb c, a - max a), with ea = exp(a - max a) and
    c = (a - max a) - (b - max b). Every lane keeps its own sums, which follow the running maxima. c differs
    from d by a constant and is of d's size, not of the logits', which is what keeps J = 1/2 (E_p c - E_q c) exact.
    """
    top_a = tl.full([ROWS], -float("inf"), tl.float32)
    top_b = tl.full([ROWS], -float("inf"), tl.float32)
    sum_a = tl.zeros([ROWS, COLS], tl.float32)
    sum_b = tl.zeros([ROWS, COLS], tl.float32)
    gap_a = tl.zeros([ROWS, COLS], tl.float32)
    gap_b = tl.zeros([ROWS, COLS], tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    # A tile without a row that counts reads nothing.
    stop = tl.where(tl.max(selected.to(tl.int32)) > 0, end, begin)
    for start in range(begin, stop, COLS):
        col = start + tl.arange(0, COLS)
        inside = selected[:, None] & (col < V)[None, :]
        x = tl.load(a + at_a[:, None] + col[None, :], mask=inside, other=-float("inf")).to(tl.float32)
        y = tl.load(b + at_b[:, None] + col[None, :], mask=inside, other=-float("inf")).to(tl.float32)
        old_a = finite_top(top_a)
        old_b = finite_top(top_b)
        next_a = tl.maximum(top_a, tl.max(x, axis=1))
        next_b = tl.maximum(top_b, tl.max(y, axis=1))
        new_a = finite_top(next_a)
        new_b = finite_top(next_b)
        shift = ((new_a - old_a) - (new_b - old_b))[:, None]
        decay_a = tl.exp(top_a - new_a)[:, None]
        decay_b = tl.exp(top_b - new_b)[:, None]
        x -= new_a[:, None]
        y -= new_b[:, None]
        ea = tl.exp(x)
        eb = tl.exp(y)
        # -inf in both is a class neither can choose; -inf in one alone must not meet a weight of 0.
        c = tl.where(x == y, 0.0, x - y)
        gap_a = (gap_a - sum_a * shift) * decay_a + tl.where(ea == 0, 0.0, ea * c)
        gap_b = (gap_b - sum_b * shift) * decay_b + tl.where(eb == 0, 0.0, eb * c)
        sum_a = sum_a * decay_a + ea
        sum_b = sum_b * decay_b + eb
        if SMOOTH:
            total -= ((start - begin) // COLS) * (new_a - old_a)[:, None]
            total += tl.where(inside, x, 0.0)
        top_a = next_a
        top_b = next_b
    return (
        finite_top(top_a), finite_top(top_b), tl.sum(sum_a, axis=1), tl.sum(sum_b, axis=1),
        tl.sum(gap_a, axis=1), tl.sum(gap_b, axis=1), tl.sum(total, axis=1),
    )  # fmt: skip


@triton.jit
def row_losses(
    a, at_a, label, counted, selected, top_a, sum_a, sum_b, gap_a, gap_b, total, V, smoothing,
    ENTROPY: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """(cross-entropy, J, log sum_a, log sum_b, E_p d, E_q d) of each row; both losses 0 where they do not count."""
    log_a = tl.log(sum_a)
    log_b = tl.log(sum_b)
    mean_p = gap_a / sum_a
    mean_q = gap_b / sum_b
    pair = tl.where(selected, 0.5 * (mean_p - mean_q), 0.0)
    entropy = tl.zeros_like(pair)
    if ENTROPY:
        # A label out of range reads nothing and gives NaN.
        known = counted & (label >= 0) & (label < V)
        entropy = log_a - (tl.load(a + at_a + label, mask=known, other=float("nan")).to(tl.float32) - top_a)
        if SMOOTH:
            entropy = (1.0 - smoothing) * entropy + smoothing * (log_a - total / V)
        entropy = tl.where(counted, entropy, 0.0)
    return entropy, pair, log_a, log_b, mean_p - (log_a - log_b), mean_q - (log_a - log_b)


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
def _point(x, y, top_a, top_b, log_a, log_b, FULL: tl.constexpr):
    """(p, q, p - q, d) of a tile. FULL: p (d - E_p d) cancels over a row and p's error does not: to two spacings."""
    x = x - top_a[:, None] - log_a[:, None]
    y = y - top_b[:, None] - log_b[:, None]
    p = exp(x) if FULL else tl.exp(x)
    q = exp(y) if FULL else tl.exp(y)
    return p, q, p - q, tl.where(x == y, 0.0, x - y)


@triton.jit
def gradient_means(
    a, b, at_a, at_b, selected, top_a, top_b, log_a, log_b, V, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """E_p d and E_q d once more, as pair_grads needs them, of its own d, whose rounding is large where the logits are.

    With the sum of p - q, which is rounding alone: a row's gradient then sums to 0 also where its parts cancel.
    """
    mean_p = tl.zeros([ROWS, COLS], tl.float32)
    mean_q = tl.zeros([ROWS, COLS], tl.float32)
    stop = tl.where(tl.max(selected.to(tl.int32)) > 0, V, 0)
    for start in range(0, stop, COLS):
        col = start + tl.arange(0, COLS)
        here = selected[:, None] & (col < V)[None, :]
        x = tl.load(a + at_a[:, None] + col[None, :], mask=here, other=0.0).to(tl.float32)
        y = tl.load(b + at_b[:, None] + col[None, :], mask=here, other=0.0).to(tl.float32)
        p, q, gap, d = _point(x, y, top_a, top_b, log_a, log_b, True)
        mean_p += tl.where(here, tl.where(p == 0, 0.0, p * d) + gap, 0.0)
        mean_q += tl.where(here, tl.where(q == 0, 0.0, q * d) + gap, 0.0)
    return tl.sum(mean_p, axis=1), tl.sum(mean_q, axis=1)


@triton.jit
def pair_grads(
    x, y, col, label, share, half, top_a, top_b, log_a, log_b, mean_p, mean_q, V, smoothing,
    ENTROPY: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Gradients on a and b of one tile [ROWS, COLS].

    share, half [ROWS]: coefficient of the cross-entropy, and half of J's.
    """
    p, q, gap, d = _point(x, y, top_a, top_b, log_a, log_b, FULL)
    if FULL:
        ga = half[:, None] * (p * (d - mean_p[:, None]) + gap)
        gb = -half[:, None] * (q * (d - mean_q[:, None]) + gap)
    else:
        ga = half[:, None] * gap
        gb = -ga
    if ENTROPY:
        target = tl.where(col[None, :] == label[:, None], 1.0 - smoothing, 0.0) + smoothing / V
        ga += share[:, None] * (p - target)
    return ga, gb


@triton.jit
def store_grads(da, db, ga, gb, row, col, at_a, at_b, V, here, inside, INPLACE: tl.constexpr):
    """One tile into da and db (None: not wanted), [n, V] each or, INPLACE, where a and b lie; zeros where not here."""
    to_a = row.to(tl.int64) * V
    to_b = to_a
    if INPLACE:
        to_a = at_a
        to_b = at_b
    if da is not None:
        ga = narrow(tl.where(here, ga, 0.0), da.dtype.element_ty)
        tl.store(da + to_a[:, None] + col[None, :], ga, mask=inside)
    if db is not None:
        gb = narrow(tl.where(here, gb, 0.0), db.dtype.element_ty)
        tl.store(db + to_b[:, None] + col[None, :], gb, mask=inside)
