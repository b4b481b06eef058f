"""Backward kernel: one read and one write of each logit, tiles independent of each other."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .pieces import offsets, pair_grads, row_flags


@triton.jit(do_not_specialize=["n", "inner", "l_outer", "m_outer", "g_outer", "ignore_index"])
def pair_grad_kernel(
    grad, a, b, labels, mask, stats, scales, da, db,
    n, inner, a_outer, a_inner, b_outer, b_inner, l_outer, l_inner, m_outer, m_inner, g_outer, g_inner,
    V, ignore_index, smoothing, weight,
    FULL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """da, db [n, V] from the logits and their saved statistics; rows that do not count get zeros and are not read."""
    ENTROPY: tl.constexpr = labels is not None
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < n
    label, counted, selected = row_flags(
        labels, mask, row, live, inner, l_outer, l_inner, m_outer, m_inner, ignore_index
    )  # fmt: skip
    g = tl.load(grad + offsets(row, inner, g_outer, g_inner), mask=selected, other=0.0).to(tl.float32)
    if ENTROPY:
        share = tl.where(counted, g * tl.load(scales), 0.0)
        half = 0.5 * (g * tl.load(scales + 1) * weight)
    else:
        share = g
        half = 0.5 * (g * tl.load(scales))
    at = stats + row.to(tl.int64)
    step = tl.cast(n, tl.int64)
    top_a = tl.load(at, mask=selected, other=0.0)
    top_b = tl.load(at + step, mask=selected, other=0.0)
    log_a = tl.load(at + 2 * step, mask=selected, other=0.0)
    log_b = tl.load(at + 3 * step, mask=selected, other=0.0)
    mean_p = top_a
    mean_q = top_b
    if FULL:
        mean_p = tl.load(at + 4 * step, mask=selected, other=0.0)
        mean_q = tl.load(at + 5 * step, mask=selected, other=0.0)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (col < V)[None, :]
    here = selected[:, None] & inside
    from_a = a + offsets(row, inner, a_outer, a_inner)[:, None] + col[None, :]
    from_b = b + offsets(row, inner, b_outer, b_inner)[:, None] + col[None, :]
    x = tl.load(from_a, mask=here, other=0.0).to(tl.float32)
    y = tl.load(from_b, mask=here, other=0.0).to(tl.float32)
    ga, gb = pair_grads(
        x, y, col, label, share, half, top_a, top_b, log_a, log_b, mean_p, mean_q, V, smoothing, ENTROPY, FULL
    )
    to = row.to(tl.int64)[:, None] * V + col[None, :]
    tl.store(da + to, narrow(tl.where(here, ga, 0.0), da.dtype.element_ty), mask=live[:, None] & inside)
    tl.store(db + to, narrow(tl.where(here, gb, 0.0), db.dtype.element_ty), mask=live[:, None] & inside)
