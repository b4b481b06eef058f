"""Kernel of the router's forward. Traffic: x once, the weight once a program (from L2), logits, gates and ids once."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow


@triton.jit(do_not_specialize=["rows"])
def router_kernel(
    x, weight, bias, gates, index, logits, rows, features,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    FEATURES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """logits = x weight^T + bias; gates = softmax(logits), or that of the TOP_K largest, with their ids.

    x [rows, features], weight [EXPERTS, features]; a tile of ROWS rows has the logits of all experts in registers.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, PADDED)
    real, live = row < rows, m < EXPERTS
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    for first in range(0, features, FEATURES):
        k = first + tl.arange(0, FEATURES)
        inside = k < features
        at = row[:, None] * features + k[None, :]
        left = tl.load(x + at, mask=real[:, None] & inside[None, :], other=0.0).to(DOT)
        there = m.to(tl.int64)[None, :] * features + k[:, None]
        right = tl.load(weight + there, mask=live[None, :] & inside[:, None], other=0.0)
        if weight.dtype.element_ty != x.dtype.element_ty:
            right = narrow(right, x.dtype.element_ty)
        acc = tl.dot(left, right.to(DOT), acc, input_precision=PRECISION)
    if bias is not None:
        b = tl.load(bias + m, mask=live, other=0.0)
        acc += narrow(b.to(tl.float32), x.dtype.element_ty).to(tl.float32)[None, :]
    to = row[:, None] * EXPERTS + m[None, :]
    mask = real[:, None] & live[None, :]
    tl.store(logits + to, acc, mask=mask)
    if TOP_K == 0:
        value = tl.where(live[None, :], acc, -float("inf"))
        share = tl.exp(value - tl.max(value, axis=1)[:, None])
        tl.store(
            gates + to, tl.div_rn(share, tl.broadcast_to(tl.sum(share, axis=1)[:, None], [ROWS, PADDED])), mask=mask
        )
    else:
        # What is not to be chosen, or no more, is no candidate; a NaN ranks as infinity does.
        rank = tl.where(acc != acc, float("inf"), acc)
        free = tl.broadcast_to(live[None, :], [ROWS, PADDED])
        slot = tl.arange(0, SLOTS)
        best = tl.full([ROWS, SLOTS], -float("inf"), tl.float32)
        ids = tl.zeros([ROWS, SLOTS], tl.int32)
        for s in range(TOP_K):
            top = tl.max(tl.where(free, rank, -float("inf")), axis=1)
            one = tl.min(tl.where(free & (rank == top[:, None]), m[None, :], PADDED), axis=1)
            chosen = m[None, :] == one[:, None]
            value = tl.sum(tl.where(chosen, acc, 0.0), axis=1)
            here = slot[None, :] == s
            best = tl.where(here, value[:, None], best)
            ids = tl.where(here, one[:, None], ids)
            free = free & ~chosen
        share = tl.exp(best - tl.max(best, axis=1)[:, None])
        share = tl.div_rn(share, tl.broadcast_to(tl.sum(share, axis=1)[:, None], [ROWS, SLOTS]))
        to = row[:, None] * TOP_K + slot[None, :]
        mask = real[:, None] & (slot < TOP_K)[None, :]
        tl.store(gates + to, share, mask=mask)
        tl.store(index + to, ids.to(tl.int64), mask=mask)
