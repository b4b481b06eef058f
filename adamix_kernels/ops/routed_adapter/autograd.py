"""Derivative of the routed adapter, in terms of its forward and backward ops."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .._library import as_base, below_autograd, differentiate
from .op import routed_adapter_backward_op
from .op import routed_adapter_op as routed_adapter_op


class RoutedAdapterFunction(torch.autograd.Function):
    """Saves x, the pre-activation [B, S, r] and the banks; everything else is recomputed."""

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
        residual: torch.Tensor | None,
        add_input: bool,
        activation: str,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, pre = below_autograd(
            routed_adapter_op,
            x, down_weight, down_bias, up_weight, up_bias, down_index, up_index,
            residual, add_input, activation, backend,
        )  # fmt: skip
        ctx.save_for_backward(x, pre, down_weight, up_weight, down_index, up_index)
        ctx.options = (add_input, activation, backend)
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        return as_base(out), pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, _grad_pre: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 11
        x, pre, down_weight, up_weight, down_index, up_index = ctx.saved_tensors
        need_x, *need_banks, _, _, need_residual = ctx.needs_input_grad[:8]
        dx = dwd = dbd = dwu = dbu = None
        if need_x or any(need_banks):
            grads = routed_adapter_backward_op(
                grad_out, x, pre, down_weight, up_weight, down_index, up_index,
                need_x, need_banks[0] or need_banks[1], need_banks[2] or need_banks[3], *ctx.options,
            )  # fmt: skip
            wanted = (need_x, *need_banks)
            dx, dwd, dbd, dwu, dbu = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return dx, dwd, dbd, dwu, dbu, None, None, grad_out if need_residual else None, None, None, None


differentiate(routed_adapter_op, RoutedAdapterFunction)
