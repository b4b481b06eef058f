"""Derivative of the gated adapter, in terms of its forward and backward ops."""

from __future__ import annotations

from typing import Any

import torch

from .._library import as_base, below_autograd, differentiate, once_differentiable
from .op import gated_adapter_backward_op
from .op import gated_adapter_op as gated_adapter_op


class GatedAdapterFunction(torch.autograd.Function):
    """Saves x, the pre-activations [B, S, slots * r], the banks and the gates; everything else is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down_weight: torch.Tensor,
        down_bias: torch.Tensor | None,
        up_weight: torch.Tensor,
        up_bias: torch.Tensor | None,
        down_index: torch.Tensor | None,
        up_index: torch.Tensor | None,
        gates: torch.Tensor,
        residual: torch.Tensor | None,
        *options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, pre = below_autograd(
            gated_adapter_op,
            x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, gates, residual, *options,
        )  # fmt: skip
        ctx.save_for_backward(x, pre, down_weight, up_weight, up_bias, down_index, up_index, gates)
        ctx.options = options
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        return as_base(out), pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, _grad_pre: torch.Tensor | None) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 13
        need_x, need_wd, need_bd, need_wu, need_bu, _, _, need_gates, need_residual, *_ = ctx.needs_input_grad
        needs = need_x, need_wd or need_bd, need_wu or need_bu, need_gates
        grads: tuple[Any, ...] = (None,) * 6
        if any(needs):
            made = gated_adapter_backward_op(grad_out, *ctx.saved_tensors, *needs, *ctx.options)
            wanted = need_x, need_wd, need_bd, need_wu, need_bu, need_gates
            grads = tuple(grad if need else None for grad, need in zip(made, wanted, strict=True))
        return *grads[:5], None, None, grads[5], grad_out if need_residual else None, *(None,) * 4


differentiate(gated_adapter_op, GatedAdapterFunction)
