"""Reference backend of gated LoRA: explicit forward and backward in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from .._dropout import dropout, keep_mask
from .._gated_matmul import bank_grad, narrow, widen
from .._gated_mix import Mix, gates_grad
from .signatures import Backward, Forward


def forward(*arguments: Any, inplace: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    a = Forward(*arguments)
    x = a.x
    if a.seed is not None:
        x = dropout(x, _keep(x, a.seed, a.dropout_p), a.dropout_p)
    t = narrow(x, a.lora_a, None, a.a_index)  # [B, S, slots, groups*r]
    h = _mix(a).forward(t, "")
    per_group = a.lora_b.shape[1] // a.groups
    parts = [widen(h_g, b_g, a.b_index) for h_g, b_g in _by_group(h, a.lora_b, a.groups)]
    t = t.flatten(2).contiguous()
    if a.base is None:
        if a.groups == 1 and a.offsets[0] == 0:
            return parts[0].contiguous(), t
        out = x.new_zeros(*x.shape[:2], max(a.offsets) + per_group)
    else:
        out = a.base if inplace else a.base.clone(memory_format=torch.contiguous_format)
    for part, offset in zip(parts, a.offsets, strict=True):
        out.narrow(2, offset, per_group).add_(part)
    return out, t


def backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    a = Backward(*arguments)
    x = a.x
    dx, da, db, dgates = x.new_empty(0), x.new_empty(0), x.new_empty(0), a.gates.new_empty(0)
    experts = a.lora_a.shape[0], a.lora_b.shape[0]
    mixed = _mix(a)
    rows = a.lora_a.shape[1]
    slots = 1 if experts[0] == 1 else a.gates.shape[-1]
    t = a.t.view(*x.shape[:2], slots, rows)
    grads = [a.grad_out.narrow(2, offset, a.lora_b.shape[1] // a.groups) for offset in a.offsets]  # each [B, S, Ng]
    if a.need_b:
        h = mixed.forward(t, "")
        each = zip(h.chunk(a.groups, 3), grads, strict=True)
        db = torch.cat([bank_grad(h_g, g, experts[1], a.b_index).mT for h_g, g in each], 1)
    if a.need_x or a.need_a or a.need_gates:
        each = zip(grads, a.lora_b.chunk(a.groups, 1), strict=True)
        dh = torch.cat([narrow(g, b_g.mT, None, a.b_index) for g, b_g in each], 3)  # [B, S, slots, groups*r]
        dt, by_row = mixed.backward(dh, t, "")
        dgates = gates_grad(by_row, a.gates) if a.need_gates else dgates
        keep = None if a.seed is None or not (a.need_x or a.need_a) else _keep(x, a.seed, a.dropout_p)
        if a.need_a:
            da = bank_grad(dt, x if keep is None else dropout(x, keep, a.dropout_p), experts[0], a.a_index)
        if a.need_x:
            dx = widen(dt, a.lora_a, a.a_index)
            dx = dx if keep is None else dropout(dx, keep, a.dropout_p)
    return dx.contiguous(), da, db, dgates


def _mix(a: Forward | Backward) -> Mix:
    experts = a.lora_a.shape[0], a.lora_b.shape[0]
    return Mix.of(a.x, experts, (a.a_index, a.b_index), a.gates, a.scales, a.scaling, a.mix)


def _by_group(h: torch.Tensor, lora_b: torch.Tensor, groups: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(h_g [B, S, slots, r], B_g as [Mb, r, Ng]) of every group."""
    return list(zip(h.chunk(groups, 3), (b_g.mT for b_g in lora_b.chunk(groups, 1)), strict=True))


def _keep(x: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    return keep_mask(seed, x.shape[0] * x.shape[1], x.shape[2], dropout_p)
