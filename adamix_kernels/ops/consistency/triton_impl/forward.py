"""Forward kernels: row losses, statistics and, if asked for, gradients; the last program sums, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import arrives_last, coefficients, load_scales, row_scales, store_scalars, sum_rows
from .pieces import gradient_means, offsets, pair_grads, row_flags, row_losses, statistics, store_grads, store_row

_SIZES = ["n", "inner", "l_outer", "m_outer", "ignore_index"]


@triton.jit(do_not_specialize=[*_SIZES, "tiles"])
def pair_rows_kernel(
    a, b, labels, mask, num_items, scales, stats, rows, da, db,
    loss, cross_entropy, consistency, factor, ticket,
    n, inner, a_outer, a_inner, b_outer, b_inner, l_outer, l_inner, m_outer, m_inner, V, ignore_index, smoothing,
    weight, tiles,
    FINISH: tl.constexpr, COUNT: tl.constexpr, MEAN: tl.constexpr, INPLACE: tl.constexpr,
    SMOOTH: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Losses and statistics of row pairs, tiles of ROWS; with da or db also those gradients, INPLACE over a and b.

    Traffic: each logit once; for the gradients once more, from L2 where the rows fit, and one write; FULL, once more.
    scales: of the cross-entropy and of J, as row_scales gives them; with COUNT every program finds them itself,
    which is cheap as its tiles are many. FINISH: the last program writes the scalars.
    """
    ENTROPY: tl.constexpr = labels is not None
    GRADS: tl.constexpr = da is not None or db is not None
    HELD: tl.constexpr = FINISH and a.dtype.element_ty == tl.float16
    entropy_scale = tl.full((), 1.0, tl.float32)
    pair_scale = entropy_scale
    if GRADS:
        if COUNT:
            entropy_scale, pair_scale = row_scales(
                labels, mask, num_items, n, inner, l_outer, l_inner, m_outer, m_inner, ignore_index, MEAN
            )
        else:
            entropy_scale, pair_scale = load_scales(scales, ENTROPY)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        live = row < n
        label, counted, selected = row_flags(
            labels, mask, row, live, inner, l_outer, l_inner, m_outer, m_inner, ignore_index
        )
        at_a = offsets(row, inner, a_outer, a_inner)
        at_b = offsets(row, inner, b_outer, b_inner)
        top_a, top_b, sum_a, sum_b, gap_a, gap_b, total = statistics(
            a, b, at_a, at_b, selected, 0, V, V, SMOOTH, ROWS, COLS
        )
        entropy, pair, log_a, log_b, mean_p, mean_q = row_losses(
            a, at_a, label, counted, selected, top_a, sum_a, sum_b, gap_a, gap_b, total, V, smoothing, ENTROPY, SMOOTH
        )
        if FULL:
            mean_p, mean_q = gradient_means(
                a, b, at_a, at_b, selected, top_a, top_b, log_a, log_b, V, ROWS, COLS
            )  # fmt: skip
        store_row(stats, rows, row, live, n, top_a, top_b, log_a, log_b, mean_p, mean_q, entropy, pair, ENTROPY, FULL)
        if GRADS:
            share, half, _ = coefficients(entropy_scale, pair_scale, weight, ENTROPY, HELD)
            share = tl.where(counted, share, 0.0)
            half = tl.where(selected, 0.5 * half, 0.0)
            # The label's logit is read by all before any thread overwrites it.
            tl.debug_barrier()
            for start in range(0, V, COLS):
                col = start + tl.arange(0, COLS)
                inside = (col < V)[None, :]
                here = selected[:, None] & inside
                x = tl.load(a + at_a[:, None] + col[None, :], mask=here, other=0.0).to(tl.float32)
                y = tl.load(b + at_b[:, None] + col[None, :], mask=here, other=0.0).to(tl.float32)
                ga, gb = pair_grads(
                    x, y, col, label, share, half, top_a, top_b, log_a, log_b, mean_p, mean_q, V, smoothing,
                    ENTROPY, FULL,
                )  # fmt: skip
                store_grads(da, db, ga, gb, row, col, at_a, at_b, V, here, live[:, None] & inside, INPLACE)
    if FINISH:  # noqa: SIM102 (an `and` would take a ticket without FINISH too)
        if arrives_last(ticket):
            if not GRADS:
                entropy_scale, pair_scale = row_scales(
                    labels, mask, num_items, n, inner, l_outer, l_inner, m_outer, m_inner, ignore_index, MEAN
                )
            entropy_sum, pair_sum = sum_rows(rows, n, ENTROPY)
            store_scalars(
                loss, cross_entropy, consistency, scales, factor, entropy_sum, pair_sum, entropy_scale, pair_scale,
                weight, ENTROPY, HELD,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*_SIZES, "chunks", "splits", "share"])
def pair_parts_kernel(
    a, b, labels, mask, num_items, scales, stats, rows, parts,
    loss, cross_entropy, consistency, factor, ticket,
    n, inner, a_outer, a_inner, b_outer, b_inner, l_outer, l_inner, m_outer, m_inner, V, ignore_index, smoothing,
    weight, chunks, splits, share,
    FINISH: tl.constexpr, MEAN: tl.constexpr, SMOOTH: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PART_ROWS: tl.constexpr,
):  # fmt: skip
    """Statistics of `chunks` times COLS columns, `share` of them, of ROWS row pairs: parts [splits, 7, n].

    The last program joins them, and stores what pair_rows_kernel does but the gradients.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < n
    _, _, selected = row_flags(labels, mask, row, live, inner, l_outer, l_inner, m_outer, m_inner, ignore_index)
    begin = tl.program_id(1) * chunks * COLS
    end = tl.minimum(begin + chunks * COLS, V)
    top_a, top_b, sum_a, sum_b, gap_a, gap_b, total = statistics(
        a, b, offsets(row, inner, a_outer, a_inner), offsets(row, inner, b_outer, b_inner), selected, begin, end, V,
        SMOOTH, ROWS, COLS,
    )  # fmt: skip
    at = parts + (tl.program_id(1) * 7).to(tl.int64) * n + row
    tl.store(at, top_a, mask=live)
    tl.store(at + n, top_b, mask=live)
    tl.store(at + 2 * n, sum_a, mask=live)
    tl.store(at + 3 * n, sum_b, mask=live)
    tl.store(at + 4 * n, gap_a, mask=live)
    tl.store(at + 5 * n, gap_b, mask=live)
    tl.store(at + 6 * n, total, mask=live)
    if arrives_last(ticket):
        _join(
            a, labels, mask, num_items, scales, stats, rows, parts, loss, cross_entropy, consistency, factor,
            n, inner, a_outer, a_inner, l_outer, l_inner, m_outer, m_inner, V, ignore_index, smoothing, weight,
            splits, share, FINISH, MEAN, SMOOTH, FULL, PART_ROWS,
        )  # fmt: skip


@triton.jit
def _join(
    a, labels, mask, num_items, scales, stats, rows, parts, loss, cross_entropy, consistency, factor,
    n, inner, a_outer, a_inner, l_outer, l_inner, m_outer, m_inner, V, ignore_index, smoothing, weight,
    splits, share,
    FINISH: tl.constexpr, MEAN: tl.constexpr, SMOOTH: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Row losses and statistics from those of the rows' parts, and the scalars if FINISH."""
    ENTROPY: tl.constexpr = labels is not None
    HELD: tl.constexpr = a.dtype.element_ty == tl.float16
    entropy_sum = tl.zeros([ROWS], tl.float32)
    pair_sum = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < n
        label, counted, selected = row_flags(
            labels, mask, row, live, inner, l_outer, l_inner, m_outer, m_inner, ignore_index
        )
        top_a, top_b, sum_a, sum_b, gap_a, gap_b, total = _combine(parts, row, live, n, splits, share, V)
        entropy, pair, log_a, log_b, mean_p, mean_q = row_losses(
            a, offsets(row, inner, a_outer, a_inner), label, counted, selected, top_a, sum_a, sum_b, gap_a, gap_b,
            total, V, smoothing, ENTROPY, SMOOTH,
        )  # fmt: skip
        store_row(stats, rows, row, live, n, top_a, top_b, log_a, log_b, mean_p, mean_q, entropy, pair, ENTROPY, FULL)
        entropy_sum += entropy
        pair_sum += pair
    if FINISH:
        entropy_scale, pair_scale = row_scales(
            labels, mask, num_items, n, inner, l_outer, l_inner, m_outer, m_inner, ignore_index, MEAN
        )
        store_scalars(
            loss, cross_entropy, consistency, scales, factor, tl.sum(entropy_sum), tl.sum(pair_sum),
            entropy_scale, pair_scale, weight, ENTROPY, HELD,
        )  # fmt: skip


@triton.jit
def _combine(parts, row, live, n, splits, share, V):
    """The statistics of whole rows from those of their parts, in the order of the columns."""
    at = parts + row
    top_a = tl.load(at, mask=live, other=0.0, cache_modifier=".cg")
    top_b = tl.load(at + n, mask=live, other=0.0, cache_modifier=".cg")
    sum_a = tl.load(at + 2 * n, mask=live, other=0.0, cache_modifier=".cg")
    sum_b = tl.load(at + 3 * n, mask=live, other=0.0, cache_modifier=".cg")
    gap_a = tl.load(at + 4 * n, mask=live, other=0.0, cache_modifier=".cg")
    gap_b = tl.load(at + 5 * n, mask=live, other=0.0, cache_modifier=".cg")
    total = tl.load(at + 6 * n, mask=live, other=0.0, cache_modifier=".cg")
    for split in range(1, splits):
        at += 7 * n
        part_a = tl.load(at, mask=live, other=0.0, cache_modifier=".cg")
        part_b = tl.load(at + n, mask=live, other=0.0, cache_modifier=".cg")
        more_a = tl.load(at + 2 * n, mask=live, other=0.0, cache_modifier=".cg")
        more_b = tl.load(at + 3 * n, mask=live, other=0.0, cache_modifier=".cg")
        # A part without a finite logit has a sum of 0 and no maximum.
        new_a = tl.where(sum_a == 0, part_a, tl.where(more_a == 0, top_a, tl.maximum(top_a, part_a)))
        new_b = tl.where(sum_b == 0, part_b, tl.where(more_b == 0, top_b, tl.maximum(top_b, part_b)))
        old = (new_a - top_a) - (new_b - top_b)
        new = (new_a - part_a) - (new_b - part_b)
        keep_a = tl.where(sum_a == 0, 0.0, tl.exp(top_a - new_a))
        keep_b = tl.where(sum_b == 0, 0.0, tl.exp(top_b - new_b))
        add_a = tl.where(more_a == 0, 0.0, tl.exp(part_a - new_a))
        add_b = tl.where(more_b == 0, 0.0, tl.exp(part_b - new_b))
        gap_a = (gap_a - sum_a * old) * keep_a
        gap_a += (tl.load(at + 4 * n, mask=live, other=0.0, cache_modifier=".cg") - more_a * new) * add_a
        gap_b = (gap_b - sum_b * old) * keep_b
        gap_b += (tl.load(at + 5 * n, mask=live, other=0.0, cache_modifier=".cg") - more_b * new) * add_b
        sum_a = sum_a * keep_a + more_a * add_a
        sum_b = sum_b * keep_b + more_b * add_b
        # Columns that came before, and those of this part, counted from their own maxima.
        before = split * share
        here = tl.minimum(share, V - split * share)
        total = total - before * (new_a - top_a)
        total += tl.load(at + 6 * n, mask=live, other=0.0, cache_modifier=".cg") - here * (new_a - part_a)
        top_a = new_a
        top_b = new_b
    return top_a, top_b, sum_a, sum_b, gap_a, gap_b, total
