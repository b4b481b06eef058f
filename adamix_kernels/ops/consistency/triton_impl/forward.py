"""Forward kernels: row losses and statistics in one read of the logits, then their sum in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .pieces import offsets, pair_grads, row_flags, row_losses, statistics, store_row

_SIZES = ["n", "inner", "l_outer", "m_outer", "ignore_index"]


@triton.jit(do_not_specialize=_SIZES)
def pair_rows_kernel(
    a, b, labels, mask, scales, stats, rows, da, db,
    n, inner, a_outer, a_inner, b_outer, b_inner, l_outer, l_inner, m_outer, m_inner, V, ignore_index, smoothing,
    SMOOTH: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Losses and statistics of ROWS row pairs; with da and db (which may be a and b) also their gradients.

    Traffic: each logit once; for the gradients once more, from L2 where the rows fit, and one write.
    scales [2]: factors of the cross-entropy's and of J's gradient.
    """
    ENTROPY: tl.constexpr = labels is not None
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < n
    label, counted, selected = row_flags(
        labels, mask, row, live, inner, l_outer, l_inner, m_outer, m_inner, ignore_index
    )  # fmt: skip
    at_a = offsets(row, inner, a_outer, a_inner)
    at_b = offsets(row, inner, b_outer, b_inner)
    top_a, top_b, sum_a, sum_b, gap_a, gap_b, total = statistics(
        a, b, at_a, at_b, selected, 0, V, V, SMOOTH, ROWS, COLS
    )
    entropy, pair, log_a, log_b, mean_p, mean_q = row_losses(
        a, at_a, label, counted, selected, top_a, sum_a, sum_b, gap_a, gap_b, total, V, smoothing, ENTROPY, SMOOTH
    )
    store_row(
        stats, rows, row, live, n, top_a, top_b, log_a, log_b, mean_p, mean_q, entropy, pair, ENTROPY, FULL
    )  # fmt: skip
    if da is not None:
        share = tl.where(counted, tl.load(scales), 0.0)
        half = tl.where(selected, tl.load(scales + 1) * 0.5, 0.0)
        # The label's logit is read by all before any thread overwrites it.
        tl.debug_barrier()
        for start in range(0, V, COLS):
            col = start + tl.arange(0, COLS)
            inside = (col < V)[None, :]
            here = selected[:, None] & inside
            x = tl.load(a + at_a[:, None] + col[None, :], mask=here, other=0.0).to(tl.float32)
            y = tl.load(b + at_b[:, None] + col[None, :], mask=here, other=0.0).to(tl.float32)
            ga, gb = pair_grads(
                x, y, col, label, share, half, top_a, top_b, log_a, log_b, mean_p, mean_q, V, smoothing, ENTROPY, FULL
            )
            to = row.to(tl.int64)[:, None] * V + col[None, :]
            tl.store(da + to, narrow(tl.where(here, ga, 0.0), da.dtype.element_ty), mask=live[:, None] & inside)
            tl.store(db + to, narrow(tl.where(here, gb, 0.0), db.dtype.element_ty), mask=live[:, None] & inside)


@triton.jit(do_not_specialize=[*_SIZES, "chunks"])
def pair_parts_kernel(
    a, b, labels, mask, parts,
    n, inner, a_outer, a_inner, b_outer, b_inner, l_outer, l_inner, m_outer, m_inner, V, ignore_index, chunks,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Statistics of `chunks` times COLS columns of ROWS row pairs: parts [splits, 7, n]."""
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


@triton.jit
def _combine(parts, row, live, n, splits, share, V, ROWS: tl.constexpr):
    """The statistics of whole rows from those of their parts, in the order of the columns."""
    at = parts + row
    top_a = tl.load(at, mask=live, other=0.0)
    top_b = tl.load(at + n, mask=live, other=0.0)
    sum_a = tl.load(at + 2 * n, mask=live, other=0.0)
    sum_b = tl.load(at + 3 * n, mask=live, other=0.0)
    gap_a = tl.load(at + 4 * n, mask=live, other=0.0)
    gap_b = tl.load(at + 5 * n, mask=live, other=0.0)
    total = tl.load(at + 6 * n, mask=live, other=0.0)
    for split in range(1, splits):
        at += 7 * n
        part_a = tl.load(at, mask=live, other=0.0)
        part_b = tl.load(at + n, mask=live, other=0.0)
        more_a = tl.load(at + 2 * n, mask=live, other=0.0)
        more_b = tl.load(at + 3 * n, mask=live, other=0.0)
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
        gap_a += (tl.load(at + 4 * n, mask=live, other=0.0) - more_a * new) * add_a
        gap_b = (gap_b - sum_b * old) * keep_b
        gap_b += (tl.load(at + 5 * n, mask=live, other=0.0) - more_b * new) * add_b
        sum_a = sum_a * keep_a + more_a * add_a
        sum_b = sum_b * keep_b + more_b * add_b
        # Columns that came before, and those of this part, counted from their own maxima.
        before = split * share
        here = tl.minimum(share, V - split * share)
        total = total - before * (new_a - top_a)
        total += tl.load(at + 6 * n, mask=live, other=0.0) - here * (new_a - part_a)
        top_a = new_a
        top_b = new_b
    return top_a, top_b, sum_a, sum_b, gap_a, gap_b, total


@triton.jit
def _inverse(count):
    return tl.where(count > 0, 1.0 / count, 0.0)


@triton.jit(do_not_specialize=[*_SIZES, "splits", "share"])
def pair_finish_kernel(
    a, b, labels, mask, parts, num_items, stats, rows, loss, cross_entropy, consistency, scales,
    n, inner, a_outer, a_inner, b_outer, b_inner, l_outer, l_inner, m_outer, m_inner, V, ignore_index, smoothing,
    weight, splits, share,
    SOURCE: tl.constexpr, MEAN: tl.constexpr, SMOOTH: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One program: sums of the row losses and the final scalars, ROWS rows at a time.

    SOURCE of a row's losses: "rows", those stored; "parts", statistics of its parts; "logits", the logits.
    scales: one over the number of rows, of the cross-entropy and of J with labels, else of J alone (1 without
    MEAN). loss None: the row losses are all that is asked for.
    """
    ENTROPY: tl.constexpr = labels is not None
    entropy_sum = tl.zeros([ROWS], tl.float32)
    pair_sum = tl.zeros([ROWS], tl.float32)
    entropy_count = tl.zeros([ROWS], tl.int32)
    pair_count = tl.zeros([ROWS], tl.int32)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < n
        label, counted, selected = row_flags(
            labels, mask, row, live, inner, l_outer, l_inner, m_outer, m_inner, ignore_index
        )  # fmt: skip
        if SOURCE == "rows":
            entropy = tl.zeros([ROWS], tl.float32)
            if ENTROPY:
                entropy = tl.load(rows + row, mask=live, other=0.0)
                pair = tl.load(rows + n + row, mask=live, other=0.0)
            else:
                pair = tl.load(rows + row, mask=live, other=0.0)
        else:
            at_a = offsets(row, inner, a_outer, a_inner)
            if SOURCE == "parts":
                top_a, top_b, sum_a, sum_b, gap_a, gap_b, total = _combine(
                    parts, row, live, n, splits, share, V, ROWS
                )  # fmt: skip
            else:
                at_b = offsets(row, inner, b_outer, b_inner)
                top_a, top_b, sum_a, sum_b, gap_a, gap_b, total = statistics(
                    a, b, at_a, at_b, selected, 0, V, V, SMOOTH, ROWS, COLS
                )
            entropy, pair, log_a, log_b, mean_p, mean_q = row_losses(
                a, at_a, label, counted, selected, top_a, sum_a, sum_b, gap_a, gap_b, total, V, smoothing,
                ENTROPY, SMOOTH,
            )  # fmt: skip
            store_row(
                stats, rows, row, live, n, top_a, top_b, log_a, log_b, mean_p, mean_q, entropy, pair, ENTROPY, FULL
            )
        entropy_sum += entropy
        pair_sum += pair
        entropy_count += counted.to(tl.int32)
        pair_count += selected.to(tl.int32)

    pair_scale = 1.0
    if MEAN:
        pair_scale = _inverse(tl.sum(pair_count).to(tl.float32))
    if ENTROPY:
        entropy_scale = _inverse(tl.sum(entropy_count).to(tl.float32))
        if num_items is not None:
            entropy_scale = _inverse(tl.load(num_items).to(tl.float32))
            pair_scale = entropy_scale
        first = tl.sum(entropy_sum) * entropy_scale
        second = tl.sum(pair_sum) * pair_scale
        tl.store(loss, first + weight * second)
        tl.store(cross_entropy, first)
        tl.store(consistency, second)
        tl.store(scales, entropy_scale)
        tl.store(scales + 1, pair_scale)
    else:
        if loss is not None:
            tl.store(loss, tl.sum(pair_sum) * pair_scale)
        tl.store(scales, pair_scale)
