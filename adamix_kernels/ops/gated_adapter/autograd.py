"""Derivative of the gated adapter, in terms of its forward and backward ops."""

from __future__ import annotations

from typing import Any

import torch

from .._library import as_base, below_autograd, differentiate, gradients_of, once_differentiable
from .op import gated_adapter_backward_op
from .op import gated_adapter_op as gated_adapter_op
from .signatures import Forward

_FIRST_OPTION = Forward._fields.index("add_input")


class GatedAdapterFunction(torch.autograd.Function):
    """Saves x, the pre-activations [B, S, slots * r], the banks and the gates; everything else is recomputed."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, pre = below_autograd(gated_adapter_op, *arguments)
        a = Forward(*arguments[:-1])
        ctx.save_for_backward(a.x, pre, a.down_weight, a.up_weight, a.up_bias, a.down_index, a.up_index, a.gates)
        ctx.options = arguments[_FIRST_OPTION:]
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        return as_base(out), pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, _grad_pre: torch.Tensor | None) -> tuple[Any, ...]:
        if grad_out is None:
            return gradients_of(Forward)
        need: Any = Forward(*ctx.needs_input_grad[:-1])
        by_bank = need.down_weight or need.down_bias, need.up_weight or need.up_bias
        grads = {}
        if any((need.x, *by_bank, need.gates)):
            made = gated_adapter_backward_op(grad_out, *ctx.saved_tensors, need.x, *by_bank, need.gates, *ctx.options)
            names = "x", "down_weight", "down_bias", "up_weight", "up_bias", "gates"
            grads = {name: grad for name, grad in zip(names, made, strict=True) if getattr(need, name)}
        return gradients_of(Forward, **grads, residual=grad_out if need.residual else None)


differentiate(gated_adapter_op, GatedAdapterFunction)
