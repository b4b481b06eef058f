"""Kernel of LoRA's merge into a weight: the weight is read once and written once, in one rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow


@triton.jit
def _factor(
    factor, line, rank, lines, stride, live,
    R: tl.constexpr, ALONG_RANK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """factor[line, rank] of a B [lines, R], or of an A [R, lines] whose rows are `stride` apart; 0 where not live."""
    if ALONG_RANK:
        at = line.to(tl.int64) * R + rank
    else:
        at = rank.to(tl.int64) * stride + line
    return tl.load(factor + at, mask=live & (rank < R), other=0.0).to(DOT)


@triton.jit
def _product(
    lora_a, lora_b, n, k, mine, features,
    R: tl.constexpr, FAN: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
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
                left = _factor(lora_a, k[:, None], rank[None, :], features, features, known[:, None], R, False, DOT)
                right = _factor(lora_b, n[None, :], rank[:, None], 0, 0, mine[None, :], R, True, DOT)
            else:
                left = _factor(lora_b, n[:, None], rank[None, :], 0, 0, mine[:, None], R, True, DOT)
                right = _factor(lora_a, k[None, :], rank[:, None], features, features, known[None, :], R, False, DOT)
            # Of float32, three TF32 products whatever PyTorch's flag: a merged weight stays.
            acc = tl.dot(left, right, acc, input_precision="tf32x3")
    return acc


@triton.jit
def merge_lora_kernel(
    weight, lora_a, lora_b, out, places, scaling, height, width,
    OFFSETS: tl.constexpr, PER_GROUP: tl.constexpr, R: tl.constexpr, FAN: tl.constexpr,
    WIDE: tl.constexpr, DOT: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """out = weight + scaling * B_g A_g on the output features of each group g, a copy elsewhere.

    weight, out [height, width]: features of the output by those of the input, the other way round with FAN.
    Both factors' parts of a tile are read once, RANKS ranks at a time.
    places: None, or int64 [3, layers], how many UNITS of elements behind the first one's the weight, A and B of each
    layer lie; programs along the second axis are layers, out [layers, height, width].
    """
    if places is not None:
        layer = tl.program_id(1)
        layers = tl.num_programs(1)
        weight += tl.load(places + layer) * UNITS[0]
        lora_a += tl.load(places + layers + layer) * UNITS[1]
        lora_b += tl.load(places + 2 * layers + layer) * UNITS[2]
        out += layer.to(tl.int64) * height * width
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
    features = height if FAN else width
    begin = first_col if FAN else first_row
    end = begin + (COLS if FAN else ROWS)
    value = w
    for g in tl.static_range(len(OFFSETS)):
        if (begin < OFFSETS[g] + PER_GROUP) & (end > OFFSETS[g]):
            j = n - OFFSETS[g]
            mine = (j >= 0) & (j < PER_GROUP)
            acc = _product(
                lora_a + g * R * features, lora_b + g * PER_GROUP * R, j, k, mine, features,
                R, FAN, WIDE, DOT, RANKS, ROWS, COLS,
            )  # fmt: skip
            merged = narrow((w.to(WIDE) + scaling * acc).to(tl.float32), out.dtype.element_ty)
            # Elsewhere not even the sign of a zero changes.
            value = tl.where(mine[None, :] if FAN else mine[:, None], merged, value)
    tl.store(out + at, value, mask=inside)
