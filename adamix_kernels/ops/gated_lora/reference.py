"""Reference backend of gated LoRA: explicit forward and backward in plain PyTorch."""

from __future__ import annotations

import torch

from .._dropout import dropout, keep_mask
from .._gated_matmul import bank_grad, narrow, widen
from .._gated_mix import Mix, gates_grad


def forward(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    gates: torch.Tensor,
    scales: torch.Tensor | None,
    base: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    mix: str,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    if seed is not None:
        x = dropout(x, _keep(x, seed, dropout_p), dropout_p)
    t = narrow(x, lora_a, None, a_index)  # [B, S, slots, groups*r]
    experts = lora_a.shape[0], lora_b.shape[0]
    h = Mix.of(x, experts, (a_index, b_index), gates, scales, scaling, mix).forward(t, "")
    per_group = lora_b.shape[1] // groups
    parts = [widen(h_g, b_g, b_index) for h_g, b_g in _by_group(h, lora_b, groups)]
    t = t.flatten(2).contiguous()
    if base is None:
        if groups == 1 and offsets[0] == 0:
            return parts[0].contiguous(), t
        out = x.new_zeros(*x.shape[:2], max(offsets) + per_group)
    else:
        out = base if inplace else base.clone(memory_format=torch.contiguous_format)
    for part, offset in zip(parts, offsets, strict=True):
        out.narrow(2, offset, per_group).add_(part)
    return out, t


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    gates: torch.Tensor,
    scales: torch.Tensor | None,
    seed: torch.Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_gates: bool,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    mix: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, da, db, dgates = x.new_empty(0), x.new_empty(0), x.new_empty(0), gates.new_empty(0)
    experts = lora_a.shape[0], lora_b.shape[0]
    mixed = Mix.of(x, experts, (a_index, b_index), gates, scales, scaling, mix)
    rows = lora_a.shape[1]
    slots = 1 if experts[0] == 1 else gates.shape[-1]
    t = t.view(*x.shape[:2], slots, rows)
    grads = [grad_out.narrow(2, offset, lora_b.shape[1] // groups) for offset in offsets]  # each [B, S, Ng]
    if need_b:
        h = mixed.forward(t, "")
        each = zip(h.chunk(groups, 3), grads, strict=True)
        db = torch.cat([bank_grad(h_g, g, experts[1], b_index).mT for h_g, g in each], 1)
    if need_x or need_a or need_gates:
        each = zip(grads, lora_b.chunk(groups, 1), strict=True)
        dh = torch.cat([narrow(g, b_g.mT, None, b_index) for g, b_g in each], 3)  # [B, S, slots, groups*r]
        dt, by_row = mixed.backward(dh, t, "")
        dgates = gates_grad(by_row, gates) if need_gates else dgates
        keep = None if seed is None or not (need_x or need_a) else _keep(x, seed, dropout_p)
        if need_a:
            da = bank_grad(dt, x if keep is None else dropout(x, keep, dropout_p), experts[0], a_index)
        if need_x:
            dx = widen(dt, lora_a, a_index)
            dx = dx if keep is None else dropout(dx, keep, dropout_p)
    return dx.contiguous(), da, db, dgates


def _by_group(h: torch.Tensor, lora_b: torch.Tensor, groups: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(h_g [B, S, slots, r], B_g as [Mb, r, Ng]) of every group."""
    return list(zip(h.chunk(groups, 3), (b_g.mT for b_g in lora_b.chunk(groups, 1)), strict=True))


def _keep(x: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    return keep_mask(seed, x.shape[0] * x.shape[1], x.shape[2], dropout_p)
