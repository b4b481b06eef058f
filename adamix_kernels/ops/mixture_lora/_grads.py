"""Explicit backward of the mixture for every backend: that of gated LoRA, which gives the gates' gradient, the
softmax's, and two matrix products, of which one adds to the gradient of x that is there.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from .._router_grads import logits_grad
from ._composed import chosen
from .signatures import Backward


def backward(a: Backward, gated: ModuleType) -> tuple[torch.Tensor, ...]:
    """(dx, d lora_a, d lora_b, d router); empty where not needed. gated: gated LoRA's backend."""
    routes = a.need_x or a.need_router
    dx, da, db = a.x.new_empty(0), a.lora_a.new_empty(0), a.lora_b.new_empty(0)
    grad_gates: Any = a.grad_gates
    if a.grad_out is not None:
        tensors = a.x, a.t, a.lora_a, a.lora_b, *chosen(a, a.indices), a.gates, None, a.seed
        needs = a.need_x, a.need_a, a.need_b, routes
        options = a.scaling, a.groups, a.offsets, a.dropout_p, "outputs"
        dx, da, db, dgates = gated.backward(a.grad_out, *tensors, *needs, *options)
        if routes:
            grad_gates = dgates if grad_gates is None else grad_gates + dgates
    drouter = a.router.new_empty(0)
    if not routes:
        return dx, da, db, drouter
    d = logits_grad(grad_gates, a.grad_logits, a.gates, a.indices, a.router.shape[0])
    flat, narrow = a.x.reshape(len(d), a.x.shape[-1]), d.to(a.x.dtype)
    if a.need_x:
        weight = a.router.to(a.x.dtype)
        dx = narrow @ weight if a.grad_out is None else dx.view_as(flat).addmm_(narrow, weight)
        dx = dx.view(a.x.shape)
    if a.need_router:
        drouter = (narrow.t() @ flat).to(a.router.dtype)
    return dx, da, db, drouter
