"""Few classes: a tile [ROWS, COLS] of whole row pairs, in registers from its one read to its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .pieces import SMALL, finite_top, means, pair_grads, pinned, point


@triton.jit
def load_pair(a, b, at_a, at_b, col, selected, V):
    """(x, y, which elements count) in float32, -inf elsewhere: rows that do not count are not read."""
    here = selected[:, None] & (col < V)[None, :]
    x = tl.load(a + at_a[:, None] + col[None, :], mask=here, other=-float("inf")).to(tl.float32)
    y = tl.load(b + at_b[:, None] + col[None, :], mask=here, other=-float("inf")).to(tl.float32)
    return x, y, here


@triton.jit
def statistics(x, y, here, SMOOTH: tl.constexpr):
    """(max a, max b, logs of the sums, E_p d, E_q d, J, sum of a - max a) of each row.

    By c = (a - max a) - (b - max b), which differs from d by a constant and is of d's size, not of the logits': that
    keeps J = 1/2 (E_p c - E_q c) exact.
    """
    top_a = finite_top(tl.max(x, axis=1))
    top_b = finite_top(tl.max(y, axis=1))
    x -= top_a[:, None]
    y -= top_b[:, None]
    ea = tl.exp(x)
    eb = tl.exp(y)
    # -inf in both is a class neither can choose; -inf in one alone must not meet a weight of 0.
    c = tl.where(x == y, 0.0, (x - y) * SMALL)
    sum_a = tl.sum(ea, axis=1)
    sum_b = tl.sum(eb, axis=1)
    mean_p = tl.sum(tl.where(ea == 0, 0.0, ea * c), axis=1) / sum_a / SMALL
    mean_q = tl.sum(tl.where(eb == 0, 0.0, eb * c), axis=1) / sum_b / SMALL
    total = sum_a
    if SMOOTH:
        total = tl.sum(tl.where(here, x, 0.0), axis=1)
    log_a = pinned(tl.log(sum_a))
    log_b = pinned(tl.log(sum_b))
    pair = 0.5 * (mean_p - mean_q)
    return top_a, top_b, log_a, log_b, mean_p - (log_a - log_b), mean_q - (log_a - log_b), pair, total


@triton.jit
def tile_means(x, y, here, top_a, top_b, log_a, log_b):
    """E_p d and E_q d as `means` has them."""
    p, q, gap, d = point(x, y, top_a[:, None], top_b[:, None], log_a[:, None], log_b[:, None], True)
    mean_p, mean_q = means(p, q, gap, d, here)
    return tl.sum(mean_p, axis=1), tl.sum(mean_q, axis=1)


@triton.jit
def tile_grads(
    x, y, col, label, share, half, top_a, top_b, log_a, log_b, mean_p, mean_q, V, smoothing,
    ENTROPY: tl.constexpr, FULL: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Gradients on a and b; share, half [ROWS]: coefficient of the cross-entropy, and half of J's."""
    p, q, gap, d = point(x, y, top_a[:, None], top_b[:, None], log_a[:, None], log_b[:, None], FULL)
    flat = pinned(share * (smoothing / V))[:, None]
    ga, gb = pair_grads(
        p, q, gap, d, share[:, None], half[:, None], mean_p[:, None], mean_q[:, None], flat, ENTROPY, FULL, SMOOTH
    )
    if ENTROPY:
        ga -= tl.where(col[None, :] == label[:, None], share[:, None] * (1.0 - smoothing), 0.0)
    return ga, gb


@triton.jit
def store_grads(da, db, ga, gb, row, col, at_a, at_b, V, here, live, INPLACE: tl.constexpr):
    """One tile into da and db (None: not wanted), [n, V] each or, INPLACE, where a and b lie; zeros where not here."""
    to_a = row.to(tl.int64) * V
    to_b = to_a
    if INPLACE:
        to_a = at_a
        to_b = at_b
    inside = live[:, None] & (col < V)[None, :]
    if da is not None:
        ga = narrow(tl.where(here, ga, 0.0), da.dtype.element_ty)
        tl.store(da + to_a[:, None] + col[None, :], ga, mask=inside)
    if db is not None:
        gb = narrow(tl.where(here, gb, 0.0), db.dtype.element_ty)
        tl.store(db + to_b[:, None] + col[None, :], gb, mask=inside)
