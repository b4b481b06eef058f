"""Explicit backward of the router for every device: matrix products, and little beside them that is elementwise."""

from __future__ import annotations

from typing import Any

import torch

from .signatures import Backward


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """What logits and gates are in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, d weight, d bias) from the gradients of gates and logits; empty where not needed."""
    a = Backward(*arguments)
    experts = a.weight.shape[0]
    d = a.grad_logits
    if a.grad_gates is not None:
        through = a.gates * (a.grad_gates - (a.gates * a.grad_gates).sum(-1, keepdim=True))
        if through.shape[-1] != experts:
            # The ids of a row differ.
            through = through.new_zeros(*through.shape[:-1], experts).scatter(-1, a.indices, through)
        d = through if d is None else d + through
    assert d is not None
    flat = d.reshape(-1, experts)
    narrow = flat.to(a.x.dtype)
    dx, dweight, dbias = a.x.new_empty(0), a.weight.new_empty(0), a.weight.new_empty(0)
    if a.need_x:
        dx = (narrow @ a.weight.to(a.x.dtype)).view(a.x.shape)
    if a.need_weight:
        dweight = (narrow.t() @ a.x.reshape(len(flat), a.x.shape[-1])).to(a.weight.dtype)
    if a.need_bias:
        dbias = flat.sum(0).to(a.weight.dtype)
    return dx, dweight, dbias
