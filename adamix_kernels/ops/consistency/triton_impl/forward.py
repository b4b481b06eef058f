"""Forward of few classes: tiles of whole row pairs, read once; the last program sums, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import arrives_last, load_scales, row_scales, store_scalars, sum_rows
from .pieces import label_logit, offsets, row_flags, row_losses, store_row
from .tiles import load_pair, statistics, store_grads, tile_grads, tile_means

_SIZES = ["n", "inner", "l_outer", "m_outer", "ignore_index"]


@triton.jit(do_not_specialize=[*_SIZES, "tiles"])
def pair_rows_kernel(
    a, b, labels, mask, num_items, scales, stats, rows, da, db,
    loss, cross_entropy, consistency, ticket,
    n, inner, a_outer, a_inner, b_outer, b_inner, l_outer, l_inner, m_outer, m_inner, V, ignore_index, smoothing,
    weight, expected, tiles,
    FINISH: tl.constexpr, COUNT: tl.constexpr, MEAN: tl.constexpr, INPLACE: tl.constexpr,
    SMOOTH: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Losses and statistics of row pairs, tiles of ROWS; with da or db also those gradients, INPLACE over a and b,
    for an incoming one of `expected`.

    scales: of the cross-entropy and of J; with COUNT, for a program that is alone, it finds and stores them itself as
    row_scales gives them. FINISH: the last program writes the scalars.
    """
    ENTROPY: tl.constexpr = labels is not None
    GRADS: tl.constexpr = da is not None or db is not None
    if COUNT:
        entropy_scale, pair_scale = row_scales(
            labels, mask, num_items, n, inner, l_outer, l_inner, m_outer, m_inner, ignore_index, MEAN
        )
    else:
        entropy_scale, pair_scale = load_scales(scales, ENTROPY)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = number * ROWS + tl.arange(0, ROWS)
        live = row < n
        label, counted, selected = row_flags(
            labels, mask, row, live, inner, l_outer, l_inner, m_outer, m_inner, ignore_index
        )
        at_a = offsets(row, inner, a_outer, a_inner)
        at_b = offsets(row, inner, b_outer, b_inner)
        col = tl.arange(0, COLS)
        x, y, here = load_pair(a, b, at_a, at_b, col, selected, V)
        top_a, top_b, log_a, log_b, mean_p, mean_q, pair, total = statistics(x, y, here, SMOOTH)
        logit = label_logit(a, at_a, label, counted, V)
        entropy, pair = row_losses(logit, counted, selected, top_a, log_a, pair, total, V, smoothing, ENTROPY, SMOOTH)
        if FULL:
            mean_p, mean_q = tile_means(x, y, here, top_a, top_b, log_a, log_b)
        store_row(stats, rows, row, live, n, top_a, top_b, log_a, log_b, mean_p, mean_q, entropy, pair, ENTROPY, FULL)
        if GRADS:
            share = tl.where(counted, expected * entropy_scale, 0.0)
            half = tl.where(selected, 0.5 * (expected * pair_scale * weight), 0.0)
            ga, gb = tile_grads(
                x, y, col, label, share, half, top_a, top_b, log_a, log_b, mean_p, mean_q, V, smoothing,
                ENTROPY, FULL, SMOOTH,
            )  # fmt: skip
            # The label's logit is read by all before any thread overwrites it.
            tl.debug_barrier()
            store_grads(da, db, ga, gb, row, col, at_a, at_b, V, here, live, INPLACE)
    if FINISH:  # noqa: SIM102 (an `and` would take a ticket without FINISH too)
        if arrives_last(ticket):
            entropy_sum, pair_sum = sum_rows(rows, n, ENTROPY)
            store_scalars(
                loss, cross_entropy, consistency, scales, entropy_sum, pair_sum, entropy_scale, pair_scale, weight,
                ENTROPY,
            )  # fmt: skip
