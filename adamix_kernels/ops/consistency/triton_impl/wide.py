"""Kernels for many classes: a program takes one row pair after another.

A row is read from its own 16-byte boundary on: where in 16 bytes it begins decides the order of its sums, and so may
change their last bits. So may whether the gradient is written with the loss, which decides a step's width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import before, edge_columns, first_vector, load_kept, load_words, span, unknown_zero
from .finish import arrives_last, load_scales, store_scalars, sum_rows
from .pieces import label_logit, load_row, offsets, row_flags, row_losses, store_row
from .wide_row import clear, row_means, statistics, write_row

_SIZES = ["n", "inner", "l_outer", "m_outer", "g_outer", "phase", "ignore_index"]


@triton.jit(do_not_specialize=[name for name in _SIZES if name != "g_outer"])
def pair_wide_kernel(
    a, b, labels, mask, scales, stats, rows, da, db, loss, cross_entropy, consistency, ticket,
    n, inner, a_outer, a_inner, b_outer, b_inner, l_outer, l_inner, m_outer, m_inner, V, phase, ignore_index,
    smoothing, weight, expected,
    FINISH: tl.constexpr, INPLACE: tl.constexpr, SMOOTH: tl.constexpr, FULL: tl.constexpr, ALIGNED: tl.constexpr,
    STORES: tl.constexpr, HELD: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, REST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Losses and statistics of row pairs; with da or db also those gradients, INPLACE over a and b, for an
    incoming one of `expected`.

    Traffic: each logit once; for the gradients once more, from L2 where the rows fit, and one write; FULL in float32
    once more. scales: of the cross-entropy and of J. FINISH: the last program writes the scalars. phase: of a; ALIGNED:
    b's rows lie as far from 16-byte boundaries as a's; STORES: so do da's and db's. HELD: a row's first steps, which
    stay in registers. REST: columns of a lane in what is left of a row.
    """
    ENTROPY: tl.constexpr = labels is not None
    GRADS: tl.constexpr = da is not None or db is not None
    EXACT: tl.constexpr = a.dtype.element_ty == tl.float32
    entropy_scale, pair_scale = load_scales(scales, ENTROPY)
    for number in range(tl.program_id(0), n, tl.num_programs(0)):
        row = number + tl.full((), 0, tl.int32)
        label, counted, selected = row_flags(
            labels, mask, row, row < n, inner, l_outer, l_inner, m_outer, m_inner, ignore_index
        )
        at_a = offsets(row, inner, a_outer, a_inner)
        at_b = offsets(row, inner, b_outer, b_inner)
        head, whole, vectors = span(at_a, phase, V, COLS, VECTOR, ALIGNED)
        in_rest = before(whole, vectors, COLS // VECTOR, REST)
        edge, in_edge = edge_columns(head, vectors, V, COLS, VECTOR)
        to_a = row.to(tl.int64) * V + head
        to_b = to_a
        if INPLACE:
            to_a = at_a + head
            to_b = at_b + head
        if selected:
            first_a = first_vector(a, at_a + head, ALIGNED)
            first_b = first_vector(b, at_b + head, ALIGNED)
            x_held, x_rest = load_kept(first_a, whole, in_rest, HELD, COLS, VECTOR, REST, ALIGNED)
            y_held, y_rest = load_kept(first_b, whole, in_rest, HELD, COLS, VECTOR, REST, ALIGNED)
            x_edge = tl.load(first_a + (edge - head), mask=in_edge, other=-float("inf"))
            y_edge = tl.load(first_b + (edge - head), mask=in_edge, other=-float("inf"))
            x_label = label_logit(a, at_a, label, counted, V)
            y_label = label_logit(b, at_b, label, counted, V)
            top_a, top_b, log_a, log_b, mean_p, mean_q, pair, total, sound = statistics(
                first_a, first_b, whole, x_held, y_held, x_rest, y_rest, in_rest, x_edge, y_edge, in_edge,
                x_label, y_label, V, EXACT, SMOOTH, ALIGNED, HELD, COLS, VECTOR, STAGES,
            )  # fmt: skip
            if not EXACT:  # noqa: SIM102 (one is a constant)
                if not sound:
                    top_a, top_b, log_a, log_b, mean_p, mean_q, pair, total, sound = statistics(
                        first_a, first_b, whole, None, None, x_rest, y_rest, in_rest, x_edge, y_edge, in_edge,
                        x_label, y_label, V, True, SMOOTH, ALIGNED, 0, COLS, VECTOR, 1,
                    )  # fmt: skip
                    # Once more, so that no register keeps them meanwhile.
                    x_held, x_rest = load_kept(first_a, whole, in_rest, HELD, COLS, VECTOR, REST, ALIGNED)
                    y_held, y_rest = load_kept(first_b, whole, in_rest, HELD, COLS, VECTOR, REST, ALIGNED)
                    if INPLACE:
                        tl.debug_barrier()  # before gradients take their place
            entropy, pair = row_losses(
                x_label, counted, selected, top_a, log_a, pair, total, V, smoothing, ENTROPY, SMOOTH
            )
            if FULL and EXACT:
                mean_p, mean_q = row_means(
                    first_a, first_b, whole, x_rest, y_rest, in_rest, x_edge, y_edge, in_edge,
                    top_a, top_b, log_a, log_b, ALIGNED, COLS, VECTOR, STAGES,
                )  # fmt: skip
            store_row(
                stats, rows, row, row < n, n, top_a, top_b, log_a, log_b, mean_p, mean_q, entropy, pair, ENTROPY, FULL
            )
            if GRADS:
                share = tl.where(counted, expected * entropy_scale, 0.0)
                half = 0.5 * (expected * pair_scale * weight)
                write_row(
                    first_a, first_b, da, db, to_a, to_b, head, whole, x_held, y_held, x_rest, y_rest, in_rest,
                    x_edge, y_edge, in_edge, edge, x_label, y_label, label, counted & (label >= 0) & (label < V),
                    top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, V, smoothing,
                    unknown_zero(n), ENTROPY, FULL, SMOOTH, STORES, ALIGNED, HELD, COLS, VECTOR, REST, STAGES,
                )  # fmt: skip
        else:
            store_row(stats, rows, row, row < n, n, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, ENTROPY, FULL)
            if GRADS:
                clear(da, db, to_a, to_b, head, whole, in_rest, in_edge, edge, STORES, COLS, VECTOR, REST)
    if FINISH:  # noqa: SIM102 (an `and` would take a ticket without FINISH too)
        if arrives_last(ticket):
            entropy_sum, pair_sum = sum_rows(rows, n, ENTROPY)
            store_scalars(
                loss, cross_entropy, consistency, scales, entropy_sum, pair_sum, entropy_scale, pair_scale, weight,
                ENTROPY,
            )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def pair_wide_grad_kernel(
    grad, a, b, labels, mask, stats, scales, da, db,
    n, inner, a_outer, a_inner, b_outer, b_inner, l_outer, l_inner, m_outer, m_inner, g_outer, g_inner, V, phase,
    ignore_index, smoothing, weight, expected,
    CORRECT: tl.constexpr, INPLACE: tl.constexpr, SMOOTH: tl.constexpr, FULL: tl.constexpr, ALIGNED: tl.constexpr,
    STORES: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """da, db (or one of them) from the logits and their saved statistics; rows that do not count are not read.

    grad: of each row, or of all. CORRECT: da and db are right already if grad is `expected`, so nothing is done.
    INPLACE: over a and b.
    """
    ENTROPY: tl.constexpr = labels is not None
    rows = n
    if CORRECT:
        rows = tl.where(tl.load(grad).to(tl.float32) == expected, 0, rows)
    entropy_scale, pair_scale = load_scales(scales, ENTROPY)
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = number + tl.full((), 0, tl.int32)
        label, counted, selected = row_flags(
            labels, mask, row, row < n, inner, l_outer, l_inner, m_outer, m_inner, ignore_index
        )
        at_a = offsets(row, inner, a_outer, a_inner)
        at_b = offsets(row, inner, b_outer, b_inner)
        head, whole, vectors = span(at_a, phase, V, COLS, VECTOR, ALIGNED)
        in_rest = before(whole, vectors, COLS // VECTOR, REST)
        edge, in_edge = edge_columns(head, vectors, V, COLS, VECTOR)
        to_a = row.to(tl.int64) * V + head
        to_b = to_a
        if INPLACE:
            to_a = at_a + head
            to_b = at_b + head
        if selected:
            first_a = first_vector(a, at_a + head, ALIGNED)
            first_b = first_vector(b, at_b + head, ALIGNED)
            x_rest = load_words(first_a, whole, in_rest, COLS // VECTOR * REST, REST, ALIGNED)
            y_rest = load_words(first_b, whole, in_rest, COLS // VECTOR * REST, REST, ALIGNED)
            x_edge = tl.load(first_a + (edge - head), mask=in_edge, other=-float("inf"))
            y_edge = tl.load(first_b + (edge - head), mask=in_edge, other=-float("inf"))
            x_label = label_logit(a, at_a, label, counted, V)
            y_label = label_logit(b, at_b, label, counted, V)
            g = tl.load(grad + offsets(row, inner, g_outer, g_inner)).to(tl.float32)
            share = tl.where(counted, g * entropy_scale, 0.0)
            half = 0.5 * (g * pair_scale * weight)
            top_a, top_b, log_a, log_b, mean_p, mean_q = load_row(stats, row, row < n, n, FULL)
            if INPLACE:
                # The row's rest and edge and the label's logit are read by all before any is overwritten.
                tl.debug_barrier()
            write_row(
                first_a, first_b, da, db, to_a, to_b, head, whole, None, None, x_rest, y_rest, in_rest,
                x_edge, y_edge, in_edge, edge, x_label, y_label, label, counted & (label >= 0) & (label < V),
                top_a, top_b, log_a, log_b, mean_p, mean_q, share, half, V, smoothing,
                0, ENTROPY, FULL, SMOOTH, STORES, ALIGNED, 0, COLS, VECTOR, REST, STAGES,
            )  # fmt: skip
        else:
            clear(da, db, to_a, to_b, head, whole, in_rest, in_edge, edge, STORES, COLS, VECTOR, REST)
