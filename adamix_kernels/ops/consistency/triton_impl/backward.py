"""Backward of few classes: one read and one write of each logit, tiles independent of each other; or nothing at all."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .finish import load_scales
from .pieces import load_row, offsets, row_flags
from .tiles import load_pair, store_grads, tile_grads

_SIZES = ["n", "inner", "l_outer", "m_outer", "g_outer", "ignore_index", "tiles"]


@triton.jit(do_not_specialize=_SIZES)
def pair_grad_kernel(
    grad, a, b, labels, mask, stats, scales, da, db,
    n, inner, a_outer, a_inner, b_outer, b_inner, l_outer, l_inner, m_outer, m_inner, g_outer, g_inner,
    V, ignore_index, smoothing, weight, expected, tiles,
    CORRECT: tl.constexpr, INPLACE: tl.constexpr, SMOOTH: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """da, db (or one of them) from the logits and their saved statistics; rows that do not count are not read.

    grad: of each row, or of all. CORRECT: da and db are right already if grad is `expected`, so nothing is done.
    INPLACE: over a and b.
    """
    ENTROPY: tl.constexpr = labels is not None
    if CORRECT:
        tiles = tl.where(tl.load(grad).to(tl.float32) == expected, 0, tiles)
    entropy_scale, pair_scale = load_scales(scales, ENTROPY)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = number * ROWS + tl.arange(0, ROWS)
        live = row < n
        label, counted, selected = row_flags(
            labels, mask, row, live, inner, l_outer, l_inner, m_outer, m_inner, ignore_index
        )
        g = tl.load(grad + offsets(row, inner, g_outer, g_inner), mask=selected, other=0.0).to(tl.float32)
        share = tl.where(counted, g * entropy_scale, 0.0)
        half = tl.where(selected, 0.5 * (g * pair_scale * weight), 0.0)
        top_a, top_b, log_a, log_b, mean_p, mean_q = load_row(stats, row, selected, n, FULL)
        at_a = offsets(row, inner, a_outer, a_inner)
        at_b = offsets(row, inner, b_outer, b_inner)
        col = tl.arange(0, COLS)
        x, y, here = load_pair(a, b, at_a, at_b, col, selected, V)
        ga, gb = tile_grads(
            x, y, col, label, share, half, top_a, top_b, log_a, log_b, mean_p, mean_q, V, smoothing,
            ENTROPY, FULL, SMOOTH,
        )  # fmt: skip
        if INPLACE:
            # Warps may hold copies of a small tile: all have read it before one overwrites it.
            tl.debug_barrier()
        store_grads(da, db, ga, gb, row, col, at_a, at_b, V, here, live, INPLACE)


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
        # As above.
        tl.debug_barrier()
        tl.store(at, narrow(value, x.dtype.element_ty), mask=inside)
