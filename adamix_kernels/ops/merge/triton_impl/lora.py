"""Kernel of LoRA's merge into a weight: the weight is read once and written once, in one rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow


@triton.jit
def merge_lora_kernel(
    weight, lora_a, lora_b, out, scaling, height, width,
    OFFSETS: tl.constexpr, PER_GROUP: tl.constexpr, R: tl.constexpr, FAN: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = weight + scaling * B_g A_g on the output features of each group g, a copy elsewhere.

    weight, out [height, width]: features of the output by those of the input, the other way round with FAN.
    The r products are multiply-adds in one order, in no tensor core's precision: the launch waits for memory.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    n = col if FAN else row
    k = row if FAN else col
    features = height if FAN else width
    acc = tl.zeros([ROWS, COLS], WIDE)
    touched = n < 0
    for g in tl.static_range(len(OFFSETS)):
        j = n - OFFSETS[g]
        mine = (j >= 0) & (j < PER_GROUP)
        touched = touched | mine
        if tl.max(mine.to(tl.int32)) > 0:
            for c in range(R):
                a = tl.load(lora_a + (g * R + c) * features + k.to(tl.int64), mask=k < features, other=0.0).to(WIDE)
                b = tl.load(lora_b + (g * PER_GROUP + j.to(tl.int64)) * R + c, mask=mine, other=0.0).to(WIDE)
                acc += (a[:, None] * b[None, :]) if FAN else (b[:, None] * a[None, :])
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    inside = (row < height)[:, None] & (col < width)[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0)
    value = narrow((w.to(WIDE) + scaling * acc).to(tl.float32), out.dtype.element_ty)
    # Elsewhere not even the sign of a zero changes.
    tl.store(out + at, tl.where(touched[None, :] if FAN else touched[:, None], value, w), mask=inside)
