"""Reference backend of routed LoRA: explicit forward and backward in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from .._dropout import dropout, keep_mask
from .._routed_matmul import add_product, adds_itself, project, project_back, weight_grad
from .signatures import Backward, Forward


def forward(*arguments: Any, inplace: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    a = Forward(*arguments)
    x = a.x
    if a.seed is not None:
        x = dropout(x, _keep(x, a.seed, a.dropout_p), a.dropout_p)
    t = project(x, a.lora_a, None, a.a_index)
    per_group = a.lora_b.shape[1] // a.groups
    if inplace and a.base is not None:
        out = a.base
    elif a.base is not None:
        if a.groups == 1 and a.base.shape[2] == per_group and not adds_itself(a.lora_b, a.b_index):
            return torch.add(
                a.base, project(t, a.lora_b, None, a.b_index), alpha=a.scaling
            ).contiguous(), t.contiguous()
        out = a.base.clone(memory_format=torch.contiguous_format)
    else:
        out = x.new_zeros(x.shape[0], x.shape[1], max(a.offsets) + per_group)
    for t_g, b_g, offset in zip(t.chunk(a.groups, 2), a.lora_b.chunk(a.groups, 1), a.offsets, strict=True):
        add_product(out.narrow(2, offset, per_group), t_g, b_g, a.b_index, a.scaling)
    return out, t.contiguous()


def backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = Backward(*arguments)
    x, t = a.x, a.t
    dx, da, db = (x.new_empty(0) for _ in range(3))
    per_group = a.lora_b.shape[1] // a.groups
    grads = [a.grad_out.narrow(2, offset, per_group) for offset in a.offsets]  # each [B, S, Ng]
    if a.need_b:
        pairs = zip(grads, t.chunk(a.groups, 2), strict=True)
        db = torch.cat([weight_grad(g, t_g, a.lora_b.shape[0], a.b_index) for g, t_g in pairs], 1).mul_(a.scaling)
    if a.need_x or a.need_a:
        pairs = zip(grads, a.lora_b.chunk(a.groups, 1), strict=True)
        dt = torch.cat([project_back(g, b_g, a.b_index) for g, b_g in pairs], 2).mul_(a.scaling)  # [B, S, groups*r]
        keep = None if a.seed is None else _keep(x, a.seed, a.dropout_p)
        if a.need_a:
            da = weight_grad(dt, x if keep is None else dropout(x, keep, a.dropout_p), a.lora_a.shape[0], a.a_index)
        if a.need_x:
            dx = project_back(dt, a.lora_a, a.a_index)
            dx = dx if keep is None else dropout(dx, keep, a.dropout_p)
    return dx.contiguous(), da, db


def _keep(x: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    return keep_mask(seed, x.shape[0] * x.shape[1], x.shape[2], dropout_p)
