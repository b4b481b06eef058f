"""Launches where the slots of all rows are grouped by expert first, with a sum of their results after."""

from __future__ import annotations

import torch

from ...._triton_utils import launch, memory
from ..._gated_sum import sum_slots
from ...routed_lora.triton_impl.weights import weight_grads
from .plan import constants, rows_call
from .rows import gated_rows_dx_kernel, gated_rows_forward_kernel


def forward(
    x, lora_a, lora_b, a_index, b_index, gates, scales, base, seed, out, t, scaling, offsets, dropout_p, mix, inplace
) -> None:
    """Fills out and t."""
    call = rows_call(x, lora_a, lora_b, a_index, b_index, gates, offsets, out.shape[2])
    per_group = call.sizes["NG"]
    y = memory(x, call.rows, len(offsets) * per_group)
    meta, grid, order = constants(gated_rows_forward_kernel, call, "lora_forward_kernel", per_group, gates, mix)

    def made(given, z, result):
        # What is narrow alone is not split.
        launch(
            gated_rows_forward_kernel, grid if result is not None else grid[:1], x.device,
            given, lora_a, lora_b, call.plan.down.index, call.plan.up.index, gates, scales, seed, z, result, t,
            *order, call.rows, x.shape[1], *call.scalars(dropout_p, scaling)[3:], **meta,
        )  # fmt: skip

    if _mixes(lora_a, lora_b, mix):
        made(x, None, None)
        # Of several chunks the row's mean stands in memory.
        made(None, memory(x, call.rows, call.packed) if meta["CHUNKS"] > 1 else None, y)
    else:
        made(x, None, y)
    sum_slots(y, base, out, call.each, per_group, call.sizes["OFFSETS"])


def backward(
    grad_out, x, t, lora_a, lora_b, a_index, b_index, gates, scales, seed, dx, da, db, dgates,
    scaling, offsets, dropout_p, mix,
) -> None:  # fmt: skip
    """Fills dx, da, db and dgates, those that are not None."""
    call = rows_call(x, lora_a, lora_b, a_index, b_index, gates, offsets, grad_out.shape[2])
    features, indices = x.shape[2], (call.plan.down.index, call.plan.up.index)
    dt = memory(x, call.rows, call.packed)
    p = memory(x, call.rows, call.packed) if db is not None else None
    keys = memory(x, call.rows // call.each, 2, dtype=torch.int32) if da is not None and seed is not None else None
    y = memory(x, call.rows, features) if dx is not None else None
    columns = features if dx is not None else 1
    meta, grid, order = constants(gated_rows_dx_kernel, call, "lora_dx_kernel", columns, gates, mix)
    scalars = call.scalars(dropout_p, scaling)[3:]

    def made(grad, own_t, weights, drawn, y, u, dt, p, dgates, keys):
        launch(
            gated_rows_dx_kernel, grid if y is not None else grid[:1], x.device,
            grad, own_t, lora_a, lora_b, *indices, *weights, drawn, y, u, dt, p, dgates, keys,
            *order, call.rows, x.shape[1], *scalars, **meta,
        )  # fmt: skip

    if _mixes(lora_a, lora_b, mix):
        u = memory(x, call.rows, call.packed)
        made(grad_out, None, (None, None), None, None, None, u, None, None, None)
        made(None, t, (gates, scales), seed, y, u, dt, p, dgates, keys)
    else:
        made(grad_out, t, (gates, scales), seed, y, None, dt, p, dgates, keys)
    if dx is not None:
        sum_slots(y, None, dx, call.each, features, (0,))
    if da is not None or db is not None:
        weight_grads(x, grad_out, dt, p, keys, da, db, *scalars, call)


def _mixes(lora_a, lora_b, mix: str) -> bool:
    return mix == "weights" and lora_a.shape[0] > 1 and lora_b.shape[0] > 1
