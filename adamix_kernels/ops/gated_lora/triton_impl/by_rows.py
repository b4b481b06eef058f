"""Launches where the slots of all rows are grouped by expert first, with a sum of their results after."""

from __future__ import annotations

import torch

from ...._triton_utils import launch, memory
from ...routed_lora.triton_impl.weights import weight_grads
from .plan import constants, rows_call
from .rows import gated_rows_dx_kernel, gated_rows_forward_kernel, gated_rows_sum_kernel

# Rows and columns of a program of the sum.
SUM_ROWS, SUM_COLUMNS = 4, 512


def forward(
    x, lora_a, lora_b, a_index, b_index, gates, scales, base, seed, out, t, scaling, offsets, dropout_p, mix, inplace
) -> None:
    """Fills out and t."""
    call = rows_call(x, lora_a, lora_b, a_index, b_index, gates, offsets, out.shape[2])
    per_group = call.sizes["NG"]
    y = memory(x, call.rows, len(offsets) * per_group)
    meta, grid, order = constants(gated_rows_forward_kernel, call, "lora_forward_kernel", per_group, gates, mix)

    def made(given, z, result):
        launch(
            gated_rows_forward_kernel, grid, x.device,
            given, lora_a, lora_b, call.plan.down.index, call.plan.up.index, gates, scales, seed, z, result, t,
            *order, call.rows, x.shape[1], *call.scalars(dropout_p, scaling)[3:], **meta,
        )  # fmt: skip

    if _mixes(lora_a, lora_b, mix):
        made(x, None, None)
        z = (_slots(t, x, call).float() * _gates(gates, x)).sum(2).to(x.dtype)
        made(None, z, y)
    else:
        made(x, None, y)
    _sum(y, base, out, call, per_group, call.sizes["OFFSETS"])


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

    def made(grad, own_t, weights, drawn, y, dt, p, dgates, keys):
        launch(
            gated_rows_dx_kernel, grid, x.device,
            grad, own_t, lora_a, lora_b, *indices, *weights, drawn, y, dt, p, dgates, keys,
            *order, call.rows, x.shape[1], *scalars, **meta,
        )  # fmt: skip

    if _mixes(lora_a, lora_b, mix):
        u = memory(x, call.rows, call.packed)
        made(grad_out, None, (None, None), None, None, u, None, None, None)
        dt, p = _mixed(u, t, gates, scales, indices, dgates, (lora_a.shape[0], lora_b.shape[0]), x, call)
        made(None, None, (None, None), seed, y, dt, None, None, keys)
    else:
        made(grad_out, t, (gates, scales), seed, y, dt, p, dgates, keys)
    if dx is not None:
        _sum(y, None, dx, call, features, (0,))
    if da is not None or db is not None:
        weight_grads(x, grad_out, dt, p, keys, da, db, *scalars, call)


def _mixed(u, t, gates, scales, indices, dgates, experts, x, call):
    """(dt, p) [rows, R] of u = scaling * dy B and t where the experts' weights are mixed; fills dgates."""
    u, t, g = _slots(u, x, call).float(), _slots(t, x, call).float(), _gates(gates, x)
    ids = [index.view(*x.shape[:2], call.each) for index in indices]
    scale = 1.0 if scales is None else scales[ids[1].clamp(0, experts[1] - 1)].unsqueeze(-1)
    z, v = (g * t).sum(2, keepdim=True), (g * scale * u).sum(2, keepdim=True)
    wrong = sum(((i < 0) | (i >= m)).any(2, keepdim=True) for i, m in zip(ids, experts, strict=True)) > 0
    if dgates is not None:
        each = (scale * u * z).sum(3) + (v * t).sum(3)
        dgates.copy_(torch.where(wrong, float("nan"), each))
    return (
        torch.where(wrong.unsqueeze(3), 0.0, value).to(x.dtype).view(call.rows, -1).contiguous()
        for value in (g * v, g * scale * z)
    )


def _mixes(lora_a, lora_b, mix: str) -> bool:
    return mix == "weights" and lora_a.shape[0] > 1 and lora_b.shape[0] > 1


def _slots(t: torch.Tensor, x: torch.Tensor, call) -> torch.Tensor:
    return t.view(*x.shape[:2], call.each, call.packed)


def _gates(gates: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """float32 [B, 1 or S, slots, 1]."""
    return (gates.unsqueeze(1) if gates.dim() == 2 else gates).float().unsqueeze(3)


def _sum(y, base, out, call, per_group: int, offsets) -> None:
    rows, width = call.rows // call.each, out.shape[2]
    launch(
        gated_rows_sum_kernel, (-(-rows // SUM_ROWS), -(-width // SUM_COLUMNS)), out.device,
        y, base, out, rows, SLOTS=call.each, WIDTH=width, NG=per_group, OFFSETS=tuple(offsets),
        BLOCK_M=SUM_ROWS, BLOCK_C=SUM_COLUMNS, num_warps=4,
    )  # fmt: skip
