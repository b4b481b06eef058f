"""Reference backend of routed LoRA: explicit forward and backward in plain PyTorch."""

from __future__ import annotations

import torch

from .._dropout import dropout, keep_mask
from .._routed_matmul import add_product, project, project_back, weight_grad


def forward(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    base: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    if seed is not None:
        x = dropout(x, _keep(x, seed, dropout_p), dropout_p)
    t = project(x, lora_a, None, a_index)
    per_group = lora_b.shape[1] // groups
    if inplace and base is not None:
        out = base
    elif base is not None:
        out = base.clone(memory_format=torch.contiguous_format)
    else:
        out = x.new_zeros(x.shape[0], x.shape[1], max(offsets) + per_group)
    for t_g, b_g, offset in zip(t.chunk(groups, 2), lora_b.chunk(groups, 1), offsets, strict=True):
        add_product(out.narrow(2, offset, per_group), t_g, b_g, b_index, scaling)
    return out, t.contiguous()


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    seed: torch.Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, da, db = (x.new_empty(0) for _ in range(3))
    per_group = lora_b.shape[1] // groups
    grads = [grad_out.narrow(2, offset, per_group) for offset in offsets]  # each [B, S, Ng]
    if need_b:
        pairs = zip(grads, t.chunk(groups, 2), strict=True)
        db = torch.cat([weight_grad(g, t_g, lora_b.shape[0], b_index) for g, t_g in pairs], 1).mul_(scaling)
    if need_x or need_a:
        pairs = zip(grads, lora_b.chunk(groups, 1), strict=True)
        dt = torch.cat([project_back(g, b_g, b_index) for g, b_g in pairs], 2).mul_(scaling)  # [B, S, groups*r]
        keep = None if seed is None else _keep(x, seed, dropout_p)
        if need_a:
            da = weight_grad(dt, x if keep is None else dropout(x, keep, dropout_p), lora_a.shape[0], a_index)
        if need_x:
            dx = project_back(dt, lora_a, a_index)
            dx = dx if keep is None else dropout(dx, keep, dropout_p)
    return dx.contiguous(), da, db


def _keep(x: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    return keep_mask(seed, x.shape[0] * x.shape[1], x.shape[2], dropout_p)
