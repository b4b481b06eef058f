"""A row pair of many classes: a program's passes over it, in steps of aligned 16-byte vectors.

Rest, edge and the first HELD steps (`columns` says what they are) are loaded before the others, and stay in registers
for both passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .columns import first_step, first_vector, held_step, load_tile, tile, unknown_zero, widened
from .lanes import fold, join, lane_grads, lane_tops, plain, powers, slopes
from .pieces import means, pair_grads, pinned, point


@triton.jit
def statistics(
    a, b, whole, x_held, y_held, x_rest, y_rest, in_rest, x_edge, y_edge, in_edge, x_label, y_label, V,
    EXACT: tl.constexpr, SMOOTH: tl.constexpr, ALIGNED: tl.constexpr,
    HELD: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`join` of a row whose first whole vectors lie at a and b."""
    DTYPE: tl.constexpr = a.dtype.element_ty
    LANES: tl.constexpr = COLS // VECTOR
    if EXACT:
        top_a = tl.full([LANES], -float("inf"), tl.float32)
        top_b = top_a
        low_a = tl.zeros([LANES], tl.float32)
        low_b = low_a
    else:
        top_a = lane_tops(first_step(a, x_held, whole, HELD, COLS, VECTOR, ALIGNED), x_label)
        top_b = lane_tops(first_step(b, y_held, whole, HELD, COLS, VECTOR, ALIGNED), y_label)
        low_a = powers(top_a)
        low_b = powers(top_b)
    sum_a = tl.zeros([LANES], tl.float32)
    sum_b = sum_a
    gap_a = sum_a
    gap_b = sum_a
    total = sum_a
    count = sum_a
    TURN: tl.constexpr = 2 if HELD > 0 else 1
    for start in tl.range(HELD * COLS, whole, TURN * COLS, num_stages=STAGES):
        for part in tl.static_range(TURN):
            x = load_tile(a, start + part * COLS, COLS, VECTOR, ALIGNED)
            y = load_tile(b, start + part * COLS, COLS, VECTOR, ALIGNED)
            top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count = fold(
                x, y, None,
                top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count, EXACT, SMOOTH,
            )  # fmt: skip
    for number in tl.static_range(HELD):
        # One step after the other, or many are in float32 at a time.
        after = unknown_zero(sum_b.to(tl.int32, bitcast=True))[:, None]
        top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count = fold(
            widened(held_step(x_held, number), DTYPE, after), widened(held_step(y_held, number), DTYPE, after), None,
            top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count, EXACT, SMOOTH,
        )  # fmt: skip
    x_rest = widened(x_rest, DTYPE)
    y_rest = widened(y_rest, DTYPE)
    top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count = fold(
        x_rest, y_rest, in_rest, top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count, EXACT, SMOOTH
    )
    top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count = fold(
        x_edge, y_edge, in_edge, top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count, EXACT, SMOOTH
    )
    return join(top_a, top_b, low_a, low_b, sum_a, sum_b, gap_a, gap_b, total, count, V, EXACT, SMOOTH)


@triton.jit
def row_means(
    a, b, whole, x_rest, y_rest, in_rest, x_edge, y_edge, in_edge, top_a, top_b, log_a, log_b,
    ALIGNED: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """E_p d and E_q d as `means` has them."""
    mean_p = tl.zeros([COLS // VECTOR, VECTOR], tl.float32)
    mean_q = mean_p
    for start in tl.range(0, whole, COLS, num_stages=STAGES):
        p, q, gap, d = point(
            load_tile(a, start, COLS, VECTOR, ALIGNED),
            load_tile(b, start, COLS, VECTOR, ALIGNED),
            top_a,
            top_b,
            log_a,
            log_b,
            True,
        )
        of_p, of_q = means(p, q, gap, d, None)
        mean_p += of_p
        mean_q += of_q
    p, q, gap, d = point(x_rest, y_rest, top_a, top_b, log_a, log_b, True)
    of_p, of_q = means(p, q, gap, d, in_rest)
    mean_p += of_p
    mean_q += of_q
    p, q, gap, d = point(x_edge, y_edge, top_a, top_b, log_a, log_b, True)
    of_p, of_q = means(p, q, gap, d, in_edge)
    return tl.sum(tl.sum(mean_p, axis=1) + tl.sum(of_p, axis=1)), tl.sum(tl.sum(mean_q, axis=1) + tl.sum(of_q, axis=1))


@triton.jit
def _store(da, db, to_a, to_b, off, ga, gb, mask, STORES: tl.constexpr):
    """One tile at da and db, or at one of them."""
    if da is not None:
        tl.store(first_vector(da, to_a, STORES) + off, narrow(ga, da.dtype.element_ty), mask=mask)
    if db is not None:
        tl.store(first_vector(db, to_b, STORES) + off, narrow(gb, db.dtype.element_ty), mask=mask)


@triton.jit
def _grads(
    x, y, low_a, low_b, half_p, half_q, at_p, at_q, flat, top_a, top_b, log_a, log_b, mean_p, mean_q, share, half,
    EXACT: tl.constexpr, ENTROPY: tl.constexpr, FULL: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile by `pair_grads`, or by `lane_grads` unless EXACT; without the label's own share."""
    if EXACT:
        p, q, gap, d = point(x.to(tl.float32), y.to(tl.float32), top_a, top_b, log_a, log_b, FULL)
        ga, gb = pair_grads(p, q, gap, d, share, half, mean_p, mean_q, flat, ENTROPY, FULL, SMOOTH)
    else:
        ga, gb = lane_grads(x, y, low_a, low_b, half_p, half_q, at_p, at_q, flat, FULL, SMOOTH)
    return ga, gb


@triton.jit
def _write(
    a, b, da, db, to_a, to_b, head, whole, x_held, y_held, x_rest, y_rest, in_rest, x_edge, y_edge, in_edge, edge,
    x_label, y_label, label, known, top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, V, smoothing, nothing,
    EXACT: tl.constexpr, ENTROPY: tl.constexpr, FULL: tl.constexpr, SMOOTH: tl.constexpr, STORES: tl.constexpr,
    ALIGNED: tl.constexpr, HELD: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, REST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A row's gradients; a and b, da + to_a and db + to_b: where its first whole vectors lie."""
    DTYPE: tl.constexpr = a.dtype.element_ty
    off = tile(COLS, VECTOR)
    flat = pinned(share * (smoothing / V))
    low_a, low_b, half_p, half_q, at_p, at_q = slopes(top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, FULL)
    # Backwards: what was read last is in L2 most likely.
    TURN: tl.constexpr = 2 if HELD > 0 else 1
    for gone in tl.range(HELD * COLS, whole, TURN * COLS, num_stages=STAGES):
        for part in tl.static_range(TURN):
            start = whole + (HELD - 1 - part) * COLS - gone
            x = load_tile(a, start, COLS, VECTOR, ALIGNED)
            y = load_tile(b, start, COLS, VECTOR, ALIGNED)
            ga, gb = _grads(
                x, y, low_a, low_b, half_p, half_q, at_p, at_q, flat,
                top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, EXACT, ENTROPY, FULL, SMOOTH,
            )  # fmt: skip
            _store(da, db, to_a, to_b, start + off, ga, gb, None, STORES)
    for number in tl.static_range(HELD):
        ga, gb = _grads(
            widened(held_step(x_held, number), DTYPE, nothing), widened(held_step(y_held, number), DTYPE, nothing),
            low_a, low_b, half_p, half_q, at_p, at_q, flat,
            top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, EXACT, ENTROPY, FULL, SMOOTH,
        )  # fmt: skip
        _store(da, db, to_a, to_b, number * COLS + off, ga, gb, None, STORES)
    ga, gb = _grads(
        widened(x_rest, DTYPE, nothing), widened(y_rest, DTYPE, nothing),
        low_a, low_b, half_p, half_q, at_p, at_q, flat,
        top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, EXACT, ENTROPY, FULL, SMOOTH,
    )  # fmt: skip
    off = tile(COLS // VECTOR * REST, REST)
    _store(da, db, to_a, to_b, whole + off, ga, gb, in_rest, STORES)
    ga, gb = _grads(
        x_edge, y_edge, low_a, low_b, half_p, half_q, at_p, at_q, flat,
        top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, EXACT, ENTROPY, FULL, SMOOTH,
    )  # fmt: skip
    _store(da, db, to_a, to_b, edge - head, ga, gb, in_edge, STORES)
    if ENTROPY:  # noqa: SIM102 (of constants Triton takes one at a time)
        if da is not None:
            ga, gb = _grads(
                x_label, y_label, low_a, low_b, half_p, half_q, at_p, at_q, flat,
                top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, EXACT, ENTROPY, FULL, SMOOTH,
            )  # fmt: skip
            # Over what another thread has just stored there.
            tl.debug_barrier()
            ga = narrow(ga - share * (1.0 - smoothing), da.dtype.element_ty)
            tl.store(da + to_a + (label - head), ga, mask=known)


@triton.jit
def write_row(
    a, b, da, db, to_a, to_b, head, whole, x_held, y_held, x_rest, y_rest, in_rest, x_edge, y_edge, in_edge, edge,
    x_label, y_label, label, known, top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, V, smoothing, nothing,
    ENTROPY: tl.constexpr, FULL: tl.constexpr, SMOOTH: tl.constexpr, STORES: tl.constexpr,
    ALIGNED: tl.constexpr, HELD: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, REST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`_write` in powers of two where the dtype and the row let it."""
    EXACT: tl.constexpr = a.dtype.element_ty == tl.float32
    if EXACT:
        _write(
            a, b, da, db, to_a, to_b, head, whole, x_held, y_held, x_rest, y_rest, in_rest, x_edge, y_edge, in_edge,
            edge, x_label, y_label, label, known, top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, V, smoothing,
            nothing, True, ENTROPY, FULL, SMOOTH, STORES, ALIGNED, HELD, COLS, VECTOR, REST, STAGES,
        )  # fmt: skip
    elif plain(top_a, top_b):
        _write(
            a, b, da, db, to_a, to_b, head, whole, x_held, y_held, x_rest, y_rest, in_rest, x_edge, y_edge, in_edge,
            edge, x_label, y_label, label, known, top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, V, smoothing,
            nothing, False, ENTROPY, FULL, SMOOTH, STORES, ALIGNED, HELD, COLS, VECTOR, REST, STAGES,
        )  # fmt: skip
    else:
        _write(
            a, b, da, db, to_a, to_b, head, whole, None, None, x_rest, y_rest, in_rest, x_edge, y_edge, in_edge,
            edge, x_label, y_label, label, known, top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, V, smoothing,
            nothing, True, ENTROPY, FULL, SMOOTH, STORES, ALIGNED, 0, COLS, VECTOR, REST, 1,
        )  # fmt: skip


@triton.jit
def clear(
    da, db, to_a, to_b, head, whole, in_rest, in_edge, edge,
    STORES: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """As _write, zeros."""
    off = tile(COLS, VECTOR)
    zeros = tl.zeros([COLS // VECTOR, VECTOR], tl.float32)
    for start in range(0, whole, COLS):
        _store(da, db, to_a, to_b, start + off, zeros, zeros, None, STORES)
    off = tile(COLS // VECTOR * REST, REST)
    zeros = tl.zeros([COLS // VECTOR, REST], tl.float32)
    _store(da, db, to_a, to_b, whole + off, zeros, zeros, in_rest, STORES)
    line = tl.zeros([COLS // VECTOR, 1], tl.float32)
    _store(da, db, to_a, to_b, edge - head, line, line, in_edge, STORES)
