"""Derivative of the routed adapter, in terms of its forward and backward ops."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .._library import below_autograd, differentiate
from .op import routed_adapter_backward_op, routed_adapter_op


class RoutedAdapterFunction(torch.autograd.Function):
    """Saves x, the pre-activation [B, S, r] and the banks; everything else is recomputed."""

    @staticmethod
    def forward(
        ctx,
        x,
        down_weight,
        down_bias,
        up_weight,
        up_bias,
        down_index,
        up_index,
        residual,
        add_input,
        activation,
        backend,
    ):
        out, pre = below_autograd(
            routed_adapter_op,
            x, down_weight, down_bias, up_weight, up_bias, down_index, up_index,
            residual, add_input, activation, backend,
        )  # fmt: skip
        ctx.save_for_backward(x, pre, down_weight, up_weight, down_index, up_index)
        ctx.options = (add_input, activation, backend)
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        return out, pre

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _grad_pre):
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
