"""Backward kernels: one read and one write of each logit, tiles independent of each other; or nothing at all."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .finish import coefficients, load_scales
from .pieces import offsets, pair_grads, row_flags, store_grads

_SIZES = ["n", "inner", "l_outer", "m_outer", "g_outer", "ignore_index", "row_tiles", "col_tiles"]


@triton.jit(do_not_specialize=_SIZES)
def pair_grad_kernel(
    grad, a, b, labels, mask, stats, scales, da, db,
    n, inner, a_outer, a_inner, b_outer, b_inner, l_outer, l_inner, m_outer, m_inner, g_outer, g_inner,
    V, ignore_index, smoothing, weight, row_tiles, col_tiles,
    CORRECT: tl.constexpr, INPLACE: tl.constexpr, HELD: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """da, db (or one of them) from the logits and their saved statistics; rows that do not count are not read.

    grad: of each row, of all, or None for 1. CORRECT: da and db are right already if grad is 1, so nothing is done.
    INPLACE: over a and b. HELD: divided by the factor that `coefficients` takes out.
    """
    ENTROPY: tl.constexpr = labels is not None
    tiles = row_tiles * col_tiles
    if CORRECT:
        tiles = tl.where(tl.load(grad).to(tl.float32) == 1.0, 0, tiles)
    entropy_scale, pair_scale = load_scales(scales, ENTROPY)
    step = tl.cast(n, tl.int64)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_tile = tile // col_tiles
        row = row_tile * ROWS + tl.arange(0, ROWS)
        live = row < n
        label, counted, selected = row_flags(
            labels, mask, row, live, inner, l_outer, l_inner, m_outer, m_inner, ignore_index
        )
        g = tl.full([ROWS], 1.0, tl.float32)
        if grad is not None:
            g = tl.load(grad + offsets(row, inner, g_outer, g_inner), mask=selected, other=0.0).to(tl.float32)
        share, half, _ = coefficients(g * entropy_scale, g * pair_scale, weight, ENTROPY, HELD)
        share = tl.where(counted, share, 0.0)
        half = tl.where(selected, 0.5 * half, 0.0)
        at = stats + row.to(tl.int64)
        top_a = tl.load(at, mask=selected, other=0.0)
        top_b = tl.load(at + step, mask=selected, other=0.0)
        log_a = tl.load(at + 2 * step, mask=selected, other=0.0)
        log_b = tl.load(at + 3 * step, mask=selected, other=0.0)
        mean_p = top_a
        mean_q = top_b
        if FULL:
            mean_p = tl.load(at + 4 * step, mask=selected, other=0.0)
            mean_q = tl.load(at + 5 * step, mask=selected, other=0.0)
        col = (tile - row_tile * col_tiles) * COLS + tl.arange(0, COLS)
        inside = (col < V)[None, :]
        here = selected[:, None] & inside
        at_a = offsets(row, inner, a_outer, a_inner)
        at_b = offsets(row, inner, b_outer, b_inner)
        x = tl.load(a + at_a[:, None] + col[None, :], mask=here, other=0.0).to(tl.float32)
        y = tl.load(b + at_b[:, None] + col[None, :], mask=here, other=0.0).to(tl.float32)
        ga, gb = pair_grads(
            x, y, col, label, share, half, top_a, top_b, log_a, log_b, mean_p, mean_q, V, smoothing, ENTROPY, FULL
        )
        store_grads(da, db, ga, gb, row, col, at_a, at_b, V, here, live[:, None] & inside, INPLACE)


@triton.jit(do_not_specialize=["n", "inner", "row_tiles", "col_tiles"])
def rescale_kernel(
    x, factor, n, inner, outer_stride, inner_stride, V, row_tiles, col_tiles, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """x [n, V] *= factor, in place; programs return at once where factor is 1."""
    by = tl.load(factor).to(tl.float32)
    for tile in range(tl.program_id(0), tl.where(by == 1.0, 0, row_tiles * col_tiles), tl.num_programs(0)):
        row_tile = tile // col_tiles
        row = row_tile * ROWS + tl.arange(0, ROWS)
        col = (tile - row_tile * col_tiles) * COLS + tl.arange(0, COLS)
        inside = (row < n)[:, None] & (col < V)[None, :]
        at = x + offsets(row, inner, outer_stride, inner_stride)[:, None] + col[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32) * by
        tl.store(at, narrow(value, x.dtype.element_ty), mask=inside)
