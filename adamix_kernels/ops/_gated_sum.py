"""Sums that the gated ops' Triton backends share: over slots, where each slot of a row has a result of its own; over
the rows of a sample, where gates are of samples.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton_utils import launch, narrow
from ._routed_plan import power_of_2

# Rows and columns of a program of the sum over slots, and rows of a sample that are summed at a time.
SUM_ROWS, SUM_COLUMNS, CHUNK = 4, 512, 64


def sum_slots(
    y: torch.Tensor, base: torch.Tensor | None, out: torch.Tensor, slots: int, per_group: int, offsets: tuple[int, ...]
) -> None:
    """out [B, S, C] = base + the slots of y [B * S * slots, groups * per_group], whose groups start at `offsets`."""
    rows, width = out.shape[0] * out.shape[1], out.shape[2]
    launch(
        gated_rows_sum_kernel, (-(-rows // SUM_ROWS), -(-width // SUM_COLUMNS)), out.device,
        y, base, out, rows, SLOTS=slots, WIDTH=width, NG=per_group, OFFSETS=offsets,
        BLOCK_M=SUM_ROWS, BLOCK_C=SUM_COLUMNS, num_warps=4,
    )  # fmt: skip


def sum_samples(row_grads: torch.Tensor, dgates: torch.Tensor) -> None:
    """dgates [B, K] = the sum of row_grads [B, S, K], of float32, over each sample's tokens."""
    batch, tokens, slots = row_grads.shape
    launch(
        gated_sample_sum_kernel, (batch,), dgates.device,
        row_grads, dgates, tokens, K=slots, KP=power_of_2(slots), CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip


@triton.jit
def sum_sample(row_grads, dgates, b, tokens, K: tl.constexpr, KP: tl.constexpr, CHUNK: tl.constexpr):
    """The gates' gradient of sample b: the sum over its tokens, in a fixed order."""
    slot = tl.arange(0, KP)
    found = tl.zeros([KP], tl.float32)
    for start in range(0, tokens, CHUNK):
        s = start + tl.arange(0, CHUNK)
        at = row_grads + (b.to(tl.int64) * tokens + s)[:, None] * K + slot[None, :]
        found += tl.sum(tl.load(at, mask=(s < tokens)[:, None] & (slot < K)[None, :], other=0.0), axis=0)
    tl.store(dgates + b.to(tl.int64) * K + slot, narrow(found, dgates.dtype.element_ty), mask=slot < K)


@triton.jit(do_not_specialize=["tokens"])
def gated_sample_sum_kernel(row_grads, dgates, tokens, K: tl.constexpr, KP: tl.constexpr, CHUNK: tl.constexpr):
    """`sum_sample` of every sample, a program each."""
    sum_sample(row_grads, dgates, tl.program_id(0), tokens, K, KP, CHUNK)


@triton.jit(do_not_specialize=["num_rows"])
def gated_rows_sum_kernel(
    y_ptr, base_ptr, out_ptr, num_rows, SLOTS: tl.constexpr, WIDTH: tl.constexpr, NG: tl.constexpr,
    OFFSETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [N, WIDTH] = base + sum over the slots, first to last, of y [N * SLOTS, groups * NG].

    Grid (row tiles, column blocks).
    """
    GROUPS: tl.constexpr = len(OFFSETS)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < num_rows)[:, None] & (c < WIDTH)[None, :]
    source = c
    for g in tl.static_range(GROUPS if NG != WIDTH else 0):
        if g == 0:
            source = tl.zeros([BLOCK_C], tl.int32) - 1
        source = tl.where((c >= OFFSETS[g]) & (c < OFFSETS[g] + NG), c - OFFSETS[g] + g * NG, source)
    at = (rows * WIDTH)[:, None] + c[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for slot in range(SLOTS):
        y = y_ptr + ((rows * SLOTS + slot) * (GROUPS * NG))[:, None] + source[None, :]
        acc += tl.load(y, mask=mask & (source >= 0)[None, :], other=0.0).to(tl.float32)
    if base_ptr is not None:
        acc += tl.load(base_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, narrow(acc, out_ptr.dtype.element_ty), mask=mask)
