"""From row losses to the final scalars: numbers of rows, coefficients, the last program's sums in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import row_flags

# Rows a step of the counting and of the final sum.
COUNT_ROWS = tl.constexpr(1024)
SUM_ROWS = tl.constexpr(1024)


@triton.jit
def inverse(count):
    return tl.where(count > 0, 1.0 / count, 0.0)


@triton.jit
def row_scales(
    labels, mask, num_items, n, inner, l_outer, l_inner, m_outer, m_inner, ignore_index, MEAN: tl.constexpr
):  # fmt: skip
    """One over the number of rows of the cross-entropy, and of J (1 without MEAN)."""
    entropy_scale = tl.full((), 1.0, tl.float32)
    pair_scale = entropy_scale
    if MEAN:
        if num_items is not None:
            entropy_scale = inverse(tl.load(num_items).to(tl.float32))
            pair_scale = entropy_scale
        elif labels is None and mask is None:
            pair_scale = inverse(tl.cast(n, tl.float32))
        else:
            entropies = tl.zeros([COUNT_ROWS], tl.int32)
            pairs = tl.zeros([COUNT_ROWS], tl.int32)
            for start in range(0, n, COUNT_ROWS):
                row = start + tl.arange(0, COUNT_ROWS)
                _, counted, selected = row_flags(
                    labels, mask, row, row < n, inner, l_outer, l_inner, m_outer, m_inner, ignore_index
                )
                entropies += counted.to(tl.int32)
                pairs += selected.to(tl.int32)
            entropy_scale = inverse(tl.sum(entropies).to(tl.float32))
            pair_scale = inverse(tl.sum(pairs).to(tl.float32))
    return entropy_scale, pair_scale


@triton.jit
def arrives_last(ticket):
    """Whether the grid's other programs are through, with all that they stored; a grid of one needs no ticket."""
    programs = tl.num_programs(0)
    arrived = programs - 1
    tl.debug_barrier()
    if ticket is not None:
        arrived = tl.atomic_add(ticket, 1, sem="acq_rel")
    return arrived == programs - 1


@triton.jit
def sum_rows(rows, n, ENTROPY: tl.constexpr):
    """Sums of the cross-entropies rows [0, :] and of J rows [1, :], or of J rows [:] alone."""
    entropies = tl.zeros([SUM_ROWS], tl.float32)
    pairs = tl.zeros([SUM_ROWS], tl.float32)
    for start in range(0, n, SUM_ROWS):
        row = start + tl.arange(0, SUM_ROWS)
        live = row < n
        # Other programs' stores: past the L1 cache.
        if ENTROPY:
            entropies += tl.load(rows + row, mask=live, other=0.0, cache_modifier=".cg")
            pairs += tl.load(rows + n + row, mask=live, other=0.0, cache_modifier=".cg")
        else:
            pairs += tl.load(rows + row, mask=live, other=0.0, cache_modifier=".cg")
    return tl.sum(entropies), tl.sum(pairs)


@triton.jit
def store_scalars(
    loss, cross_entropy, consistency, scales, entropy_sum, pair_sum, entropy_scale, pair_scale, weight,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """The losses, and both scales (J's alone without labels)."""
    second = pair_sum * pair_scale
    if ENTROPY:
        first = entropy_sum * entropy_scale
        tl.store(loss, first + weight * second)
        tl.store(cross_entropy, first)
        tl.store(consistency, second)
        tl.store(scales, entropy_scale)
        tl.store(scales + 1, pair_scale)
    else:
        tl.store(loss, second)
        tl.store(scales, pair_scale)


@triton.jit
def load_scales(scales, ENTROPY: tl.constexpr):
    """(of the cross-entropy, of J); J's alone without labels."""
    entropy_scale = tl.load(scales)
    pair_scale = entropy_scale
    if ENTROPY:
        pair_scale = tl.load(scales + 1)
    return entropy_scale, pair_scale


@triton.jit(do_not_specialize=["n", "inner", "l_outer", "m_outer", "ignore_index"])
def pair_count_kernel(
    labels, mask, num_items, scales, ticket, n, inner, l_outer, l_inner, m_outer, m_inner, ignore_index,
    MEAN: tl.constexpr,
):  # fmt: skip
    """One program: the scales, once for all programs of the next launch, and a ticket of 0 for them."""
    entropy_scale, pair_scale = row_scales(
        labels, mask, num_items, n, inner, l_outer, l_inner, m_outer, m_inner, ignore_index, MEAN
    )
    if labels is not None:
        tl.store(scales, entropy_scale)
        tl.store(scales + 1, pair_scale)
    else:
        tl.store(scales, pair_scale)
    tl.store(ticket, 0)
