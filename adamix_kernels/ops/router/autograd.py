"""Derivative of the router, in terms of its forward and backward ops."""

from __future__ import annotations

from typing import Any

import torch

from .._library import below_autograd, differentiate, gradients_of, once_differentiable
from .op import router_backward_op
from .op import router_op as router_op
from .signatures import Forward


class RouterFunction(torch.autograd.Function):
    """Saves x, the weight, the gates and the ids."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, weight, _, _, ctx.backend = arguments
        gates, index, logits = below_autograd(router_op, *arguments)
        ctx.save_for_backward(x, weight, gates, index)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return gates, index, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gates: Any, _grad_index: Any, grad_logits: Any) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        if grad_gates is None and grad_logits is None:
            return gradients_of(Forward)
        made = router_backward_op(grad_gates, grad_logits, *ctx.saved_tensors, *wanted, ctx.backend)
        dx, dweight, dbias = (grad if want else None for grad, want in zip(made, wanted, strict=True))
        return gradients_of(Forward, x=dx, weight=dweight, bias=dbias)


differentiate(router_op, RouterFunction)
