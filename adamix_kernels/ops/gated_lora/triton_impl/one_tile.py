"""Launches where a tile holds the narrow columns of all experts."""

from __future__ import annotations

import torch

from ...._triton_utils import launch, memory
from ...routed_lora.triton_impl.plan import gaps
from ...routed_lora.triton_impl.weights import weight_grads
from .forward import gated_lora_forward_kernel
from .input_grad import gated_lora_dx_kernel
from .plan import constants, tile_call


def forward(
    x, lora_a, lora_b, a_index, b_index, gates, scales, base, seed, out, t, scaling, offsets, dropout_p, mix, inplace
) -> None:
    """Fills out and t."""
    call = tile_call(x, lora_a, lora_b, a_index, b_index, gates, offsets, out.shape[2])
    per_group = call.sizes["NG"]
    meta, grid, _ = constants(gated_lora_forward_kernel, call, "lora_forward_kernel", per_group, gates, mix)
    launch(
        gated_lora_forward_kernel, grid, x.device,
        x, lora_a, lora_b, call.plan.down.index, call.plan.up.index, gates, scales, base, seed, out, t,
        call.rows, call.tokens, *call.scalars(dropout_p, scaling)[3:],
        GAPS=() if inplace else gaps(offsets, per_group, out.shape[2]), **meta,
    )  # fmt: skip


def backward(
    grad_out, x, t, lora_a, lora_b, a_index, b_index, gates, scales, seed, dx, da, db, dgates,
    scaling, offsets, dropout_p, mix,
) -> None:  # fmt: skip
    """Fills dx, da, db and dgates, those that are not None."""
    call = tile_call(x, lora_a, lora_b, a_index, b_index, gates, offsets, grad_out.shape[2])
    dt = memory(x, call.rows, lora_a.shape[0] * call.packed) if da is not None else None
    p = memory(x, call.rows, lora_b.shape[0] * call.packed) if db is not None else None
    # A row's keys of the mask, which each block of features would compute anew.
    keys = memory(x, call.rows, 2, dtype=torch.int32) if da is not None and seed is not None else None
    columns = x.shape[2] if dx is not None else 1
    meta, grid, _ = constants(gated_lora_dx_kernel, call, "lora_dx_kernel", columns, gates, mix)
    scalars = call.scalars(dropout_p, scaling)[3:]
    launch(
        gated_lora_dx_kernel, grid, x.device,
        grad_out, t, lora_a, lora_b, call.plan.down.index, call.plan.up.index, gates, scales, seed,
        dx, dt, p, dgates, keys, call.rows, call.tokens, *scalars, **meta,
    )  # fmt: skip
    if da is not None or db is not None:
        weight_grads(x, grad_out, dt, p, keys, da, db, *scalars, call)
