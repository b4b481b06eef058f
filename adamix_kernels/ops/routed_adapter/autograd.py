"""Derivative of the routed adapter, in terms of its forward and backward ops."""

from __future__ import annotations

from collections.abc import Callable
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
        return gradients(ctx, grad_out, ctx.needs_input_grad[:8], _dispatched)


def _dispatched(_: Any, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    return routed_adapter_backward_op(*arguments)


def gradients(
    ctx: Any,
    grad_out: torch.Tensor,
    needs: tuple[bool, ...],
    backward: Callable[[Any, tuple[Any, ...]], tuple[torch.Tensor, ...]],
) -> tuple[torch.Tensor | None, ...]:
    """Of each of the op's arguments. needs: for x to residual. backward(ctx, the backward op's arguments)."""
    x, pre, down_weight, up_weight, down_index, up_index = ctx.saved_tensors
    need_x, need_wd, need_bd, need_wu, need_bu, _, _, need_residual = needs
    need_down, need_up = need_wd or need_bd, need_wu or need_bu
    dx = dwd = dbd = dwu = dbu = None
    if need_x or need_down or need_up:
        dx, dwd, dbd, dwu, dbu = backward(
            ctx,
            (
                grad_out, x, pre, down_weight, up_weight, down_index, up_index, need_x, need_down, need_up,
                *ctx.options,
            ),
        )  # fmt: skip
    return (
        dx if need_x else None,
        dwd if need_wd else None,
        dbd if need_bd else None,
        dwu if need_wu else None,
        dbu if need_bu else None,
        None,
        None,
        grad_out if need_residual else None,
        None,
        None,
        None,
    )


differentiate(routed_adapter_op, RoutedAdapterFunction)
