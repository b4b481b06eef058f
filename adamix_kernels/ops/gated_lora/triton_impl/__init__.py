"""Triton backend of gated LoRA: the forward is one launch, the backward at most three, where a tile holds the narrow
columns of all experts (one_tile.py); else the slots of all rows are grouped by expert on the device first (by_rows.py).
The gradient of gates of samples takes one launch more.
"""

from __future__ import annotations

import torch

from ...._triton_utils import memory
from ...._triton_utils import problem as unsupported
from ..._gated_plans import PlannedGated
from ..._gated_sum import sum_samples
from . import by_rows, one_tile
from .aot import aot_cases
from .plan import in_one_tile

__all__ = ["aot_cases", "backward", "direct", "forward", "unsupported"]


def forward(
    x, lora_a, lora_b, a_index, b_index, gates, scales, base, seed, scaling, groups, offsets, dropout_p, mix,
    inplace=False,
):  # fmt: skip
    batch, tokens, _ = x.shape
    width = max(offsets) + lora_b.shape[1] // groups if base is None else base.shape[2]
    slots = gates.shape[-1]
    t = memory(x, batch, tokens, (slots if lora_a.shape[0] > 1 else 1) * lora_a.shape[1])
    if slots == 0:
        out = base if inplace else x.new_zeros(batch, tokens, width) if base is None else base.clone()
        return out.contiguous(), t.zero_()
    # In place a program reads and writes each element once, and the columns of no group are left alone.
    out = base if inplace else memory(x, batch, tokens, width)
    if batch * tokens == 0:
        return out, t
    x, lora_a, lora_b, gates = (z.contiguous() for z in (x, lora_a, lora_b, gates))
    scales, base = (None if z is None else z.contiguous() for z in (scales, base))
    way = one_tile if in_one_tile(lora_a, lora_b, a_index, b_index, slots, mix) else by_rows
    options = scaling, offsets, dropout_p, mix, inplace
    way.forward(x, lora_a, lora_b, a_index, b_index, gates, scales, base, seed, out, t, *options)
    return out, t


def backward(
    grad_out, x, t, lora_a, lora_b, a_index, b_index, gates, scales, seed,
    need_x, need_a, need_b, need_gates, scaling, groups, offsets, dropout_p, mix,
):  # fmt: skip
    needed = ((x, need_x), (lora_a, need_a), (lora_b, need_b))
    grads = [memory(x, *(like.shape if wanted else (0,))) for like, wanted in needed]
    batch, tokens, _ = x.shape
    slots = gates.shape[-1]
    if batch * tokens * slots == 0:
        return *(grad.zero_() for grad in grads), gates.new_zeros(gates.shape if need_gates else 0)
    by_sample = gates.dim() == 2
    dgates = None
    if need_gates:
        dgates = memory(gates, batch, tokens, slots, dtype=torch.float32 if by_sample else gates.dtype)
    wanted = [grad if needs else None for grad, (_, needs) in zip(grads, needed, strict=True)]
    grad_out, x, t, lora_a, lora_b, gates = (z.contiguous() for z in (grad_out, x, t, lora_a, lora_b, gates))
    scales = None if scales is None else scales.contiguous()
    way = one_tile if in_one_tile(lora_a, lora_b, a_index, b_index, slots, mix) else by_rows
    way.backward(
        grad_out, x, t, lora_a, lora_b, a_index, b_index, gates, scales, seed, *wanted, dgates,
        scaling, offsets, dropout_p, mix,
    )  # fmt: skip
    if dgates is None:
        return *grads, memory(gates, 0)
    if not by_sample:
        return *grads, dgates
    of_samples = memory(gates, *gates.shape)
    sum_samples(dgates, of_samples)
    return *grads, of_samples


def _forward_in_place(*arguments):
    return forward(*arguments, inplace=True)[1:]


direct = PlannedGated(forward, backward, (9, 10), (3, 5), _forward_in_place)
