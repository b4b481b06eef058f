"""Triton backend of gated LoRA: one launch forward, at most three backward, where all experts' narrow columns fit in one
tile.
"""

from __future__ import annotations

import torch

from ...._triton_utils import launch, memory
from ...._triton_utils import problem as unsupported
from ...routed_lora.triton_impl.plan import gaps
from ...routed_lora.triton_impl.weights import weight_grads
from .forward import gated_lora_forward_kernel
from .input_grad import gated_lora_dx_kernel
from .plan import constants, make_call

__all__ = ["backward", "forward", "unsupported"]


def forward(
    x, lora_a, lora_b, a_index, b_index, gates, scales, base, seed, scaling, groups, offsets, dropout_p, mix,
    inplace=False,
):  # fmt: skip
    batch, tokens, _ = x.shape
    per_group = lora_b.shape[1] // groups
    width = max(offsets) + per_group if base is None else base.shape[2]
    # In place a program reads and writes each element once, and the columns of no group are left alone.
    out = base if inplace else memory(x, batch, tokens, width)
    slots = 1 if lora_a.shape[0] == 1 else gates.shape[-1]
    t = memory(x, batch, tokens, slots * lora_a.shape[1])
    if batch * tokens == 0:
        return out, t
    call = make_call(*x.shape[:2], lora_a, lora_b, a_index, b_index, gates, offsets, width)
    meta, grid = constants(call, "lora_forward_kernel", per_group, gates, mix)
    launch(
        gated_lora_forward_kernel, grid, x.device,
        x.contiguous(), lora_a.contiguous(), lora_b.contiguous(), call.plan.down.index, call.plan.up.index,
        gates.contiguous(), None if scales is None else scales.contiguous(),
        None if base is None else base.contiguous(), seed, out, t, call.rows, tokens,
        *call.scalars(dropout_p, scaling)[3:], GAPS=() if inplace else gaps(offsets, per_group, width), **meta,
    )  # fmt: skip
    return out, t


def backward(
    grad_out, x, t, lora_a, lora_b, a_index, b_index, gates, scales, seed,
    need_x, need_a, need_b, need_gates, scaling, groups, offsets, dropout_p, mix,
):  # fmt: skip
    needed = ((x, need_x), (lora_a, need_a), (lora_b, need_b))
    grads = [memory(x, *(like.shape if wanted else (0,))) for like, wanted in needed]
    if x.shape[0] * x.shape[1] == 0:
        dgates = gates.new_zeros(gates.shape if need_gates else 0)
        return *(grad.zero_() for grad in grads), dgates
    call = make_call(*x.shape[:2], lora_a, lora_b, a_index, b_index, gates, offsets, grad_out.shape[2])
    dx, da, db = (grad if wanted else None for grad, (_, wanted) in zip(grads, needed, strict=True))
    grad_out, x, t, lora_a, lora_b = (z.contiguous() for z in (grad_out, x, t, lora_a, lora_b))
    scalars = call.scalars(dropout_p, scaling)
    by_sample = gates.dim() == 2
    # One gate a sample gets the sum over its tokens: of float32, in their order.
    dgates = None
    if need_gates:
        dgates = memory(gates, call.rows, call.slots, dtype=torch.float32 if by_sample else gates.dtype)
    dt = memory(x, call.rows, lora_a.shape[0] * call.packed) if need_a else None
    p = memory(x, call.rows, lora_b.shape[0] * call.packed) if need_b else None
    # A row's keys of the mask, which each block of features would compute anew.
    keys = memory(x, call.rows, 2, dtype=torch.int32) if need_a and seed is not None else None
    meta, grid = constants(call, "lora_dx_kernel", x.shape[2] if need_x else 1, gates, mix)
    launch(
        gated_lora_dx_kernel, grid, x.device,
        grad_out, t, lora_a, lora_b, call.plan.down.index, call.plan.up.index, gates.contiguous(),
        None if scales is None else scales.contiguous(), seed, dx, dt, p, dgates, keys, call.rows, x.shape[1],
        *scalars[3:], **meta,
    )  # fmt: skip
    if need_a or need_b:
        weight_grads(x, grad_out, dt, p, keys, da, db, *scalars[3:], call)
    if dgates is None:
        return *grads, gates.new_empty(0)
    if by_sample:
        dgates = dgates.view(*x.shape[:2], call.slots).sum(1).to(gates.dtype)
    return *grads, dgates.view(gates.shape)
