"""Explicit backward of the router for every device: matrix products, and little beside them that is elementwise."""

from __future__ import annotations

from typing import Any

import torch

from .._router_grads import logits_grad
from .signatures import Backward


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """What logits and gates are in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, d weight, d bias) from the gradients of gates and logits; empty where not needed."""
    a = Backward(*arguments)
    flat = logits_grad(a.grad_gates, a.grad_logits, a.gates, a.indices, a.weight.shape[0])
    narrow = flat.to(a.x.dtype)
    dx, dweight, dbias = a.x.new_empty(0), a.weight.new_empty(0), a.weight.new_empty(0)
    if a.need_x:
        dx = (narrow @ a.weight.to(a.x.dtype)).view(a.x.shape)
    if a.need_weight:
        dweight = (narrow.t() @ a.x.reshape(len(flat), a.x.shape[-1])).to(a.weight.dtype)
    if a.need_bias:
        dbias = flat.sum(0).to(a.weight.dtype)
    return dx, dweight, dbias
