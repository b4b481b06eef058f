"""Kernel of LoRA's merge into a weight: the weight is read once and written once, in one rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .experts import divide, shares


@triton.jit
def _factor(
    factor, line, rank, lines, stride, live, scores, mean, kept,
    R: tl.constexpr, ALONG_RANK: tl.constexpr, DOT: tl.constexpr, EXPERTS: tl.constexpr, APART,
):  # fmt: skip
    """factor[line, rank] of a B [lines, R], or of an A [R, lines] whose rows are `stride` apart; 0 where not live.

    Of a bank of EXPERTS, APART elements from one to the next: the mean as merge_experts has it, rounded; it goes to
    `mean`, too, where kept.
    """
    if ALONG_RANK:
        at = line.to(tl.int64) * R + rank
    else:
        at = rank.to(tl.int64) * stride + line
    mask = live & (rank < R)
    if EXPERTS == 1:
        value = tl.load(factor + at, mask=mask, other=0.0)
    else:
        PADDED: tl.constexpr = triton.next_power_of_2(EXPERTS)
        UNROLL: tl.constexpr = min(PADDED, 8)
        share = shares(scores, True, EXPERTS, PADDED, tl.float32)
        m = tl.arange(0, PADDED)
        acc = tl.zeros(at.shape, tl.float32)
        for first in range(0, EXPERTS, UNROLL):
            for step in tl.static_range(UNROLL):
                expert = first + step
                here = mask & (expert < EXPERTS)
                x = tl.load(factor + tl.cast(APART, tl.int64) * expert + at, mask=here, other=0.0).to(tl.float32)
                acc += x if scores is None else x * tl.sum(tl.where(m == expert, share, 0.0))
        # The quotient by a power of two is exact.
        acc = acc * (1 / EXPERTS) if scores is None and PADDED == EXPERTS else divide(acc, tl.sum(share), tl.float32)
        value = narrow(acc, factor.dtype.element_ty)
        tl.store(mean + at, value, mask=mask & kept)
    return value.to(DOT)


@triton.jit
def _product(
    lora_a, lora_b, n, k, mine, features, a_scores, b_scores, a_mean, b_mean, keep_a, keep_b, a_apart,
    R: tl.constexpr, FAN: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MA: tl.constexpr, MB: tl.constexpr,
    B_APART: tl.constexpr,
):  # fmt: skip
    """B_g A_g [ROWS, COLS], or its transpose: outputs n of the group where `mine`, inputs k."""
    acc = tl.zeros([ROWS, COLS], WIDE)
    known = k < features
    if DOT == tl.float64:  # noqa: SIM300
        for c in range(R):
            a = tl.load(lora_a + c * features + k.to(tl.int64), mask=known, other=0.0)
            b = tl.load(lora_b + n.to(tl.int64) * R + c, mask=mine, other=0.0)
            acc += (a[:, None] * b[None, :]) if FAN else (b[:, None] * a[None, :])
    else:
        for first in tl.static_range(0, R, RANKS):
            rank = first + tl.arange(0, RANKS)
            if FAN:
                left = _factor(
                    lora_a, k[:, None], rank[None, :], features, features, known[:, None], a_scores, a_mean, keep_a,
                    R, False, DOT, MA, a_apart,
                )  # fmt: skip
                right = _factor(
                    lora_b, n[None, :], rank[:, None], 0, 0, mine[None, :], b_scores, b_mean, keep_b,
                    R, True, DOT, MB, B_APART,
                )  # fmt: skip
            else:
                left = _factor(
                    lora_b, n[:, None], rank[None, :], 0, 0, mine[:, None], b_scores, b_mean, keep_b,
                    R, True, DOT, MB, B_APART,
                )  # fmt: skip
                right = _factor(
                    lora_a, k[None, :], rank[:, None], features, features, known[None, :], a_scores, a_mean, keep_a,
                    R, False, DOT, MA, a_apart,
                )  # fmt: skip
            # Of float32, three TF32 products whatever PyTorch's flag: a merged weight stays.
            acc = tl.dot(left, right, acc, input_precision="tf32x3")
    return acc


@triton.jit
def merge_lora_kernel(
    weight, lora_a, lora_b, out, places, scaling, height, width, a_scores, b_scores, a_mean, b_mean,
    OFFSETS: tl.constexpr, PER_GROUP: tl.constexpr, R: tl.constexpr, FAN: tl.constexpr,
    WIDE: tl.constexpr, DOT: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    MA: tl.constexpr, MB: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """out = weight + scaling * B_g A_g on the output features of each group g, a copy elsewhere.

    weight, out [height, width]: features of the output by those of the input, the other way round with FAN.
    Both factors' parts of a tile are read once, RANKS ranks at a time.
    lora_a, lora_b: factors, or banks of MA and of MB experts; a_scores, b_scores: a bank's [experts], float32, None for
    the uniform mean. Means go to a_mean, b_mean [layers, ...], that of A by the tile of the group's first output, that
    of B by the tile of the first input; None of a factor.
    places: None, or int64 [5, layers], how many UNITS of elements behind the first one's the weight, A, B and the
    scores of each layer lie; programs along the second axis are layers, out [layers, height, width].
    """
    features = height if FAN else width
    GROUPS: tl.constexpr = len(OFFSETS)
    a_apart = features * (GROUPS * R)
    B_APART: tl.constexpr = GROUPS * PER_GROUP * R
    if places is not None:
        layer = tl.program_id(1)
        layers = tl.num_programs(1)
        weight += tl.load(places + layer) * UNITS[0]
        lora_a += tl.load(places + layers + layer) * UNITS[1]
        lora_b += tl.load(places + 2 * layers + layer) * UNITS[2]
        out += layer.to(tl.int64) * height * width
        if a_scores is not None:
            a_scores += tl.load(places + 3 * layers + layer) * UNITS[3]
        if b_scores is not None:
            b_scores += tl.load(places + 4 * layers + layer) * UNITS[4]
        if MA > 1:
            a_mean += layer.to(tl.int64) * a_apart
        if MB > 1:
            b_mean += layer.to(tl.int64) * B_APART
    across = tl.cdiv(width, COLS)
    first_row = tl.program_id(0) // across * ROWS
    first_col = tl.program_id(0) % across * COLS
    row = first_row + tl.arange(0, ROWS)
    col = first_col + tl.arange(0, COLS)
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    inside = (row < height)[:, None] & (col < width)[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0)
    n = col if FAN else row
    k = row if FAN else col
    begin = first_col if FAN else first_row
    end = begin + (COLS if FAN else ROWS)
    first_input = (first_row if FAN else first_col) == 0
    value = w
    for g in tl.static_range(GROUPS):
        if (begin < OFFSETS[g] + PER_GROUP) & (end > OFFSETS[g]):
            j = n - OFFSETS[g]
            mine = (j >= 0) & (j < PER_GROUP)
            first_output = (begin <= OFFSETS[g]) & (end > OFFSETS[g])
            acc = _product(
                lora_a + g * R * features, lora_b + g * PER_GROUP * R, j, k, mine, features, a_scores, b_scores,
                a_mean + g * R * features if MA > 1 else None, b_mean + g * PER_GROUP * R if MB > 1 else None,
                first_output, first_input, a_apart, R, FAN, WIDE, DOT, RANKS, ROWS, COLS, MA, MB, B_APART,
            )  # fmt: skip
            merged = narrow((w.to(WIDE) + scaling * acc).to(tl.float32), out.dtype.element_ty)
            # Elsewhere not even the sign of a zero changes.
            value = tl.where(mine[None, :] if FAN else mine[:, None], merged, value)
    tl.store(out + at, value, mask=inside)
