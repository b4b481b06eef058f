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
        needs = ctx.needs_input_grad
        grads = gradients(grad_out, ctx.saved_tensors, needs[:5], ctx.options, None)
        return *grads, None, None, grad_out if needs[7] else None, None, None, None


def gradients(
    grad_out: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    needs: tuple[bool, ...],
    options: tuple[Any, ...],
    direct: Callable[..., tuple[torch.Tensor, ...] | None] | None,
) -> tuple[torch.Tensor | None, ...]:
    """Of x, down_weight, down_bias, up_weight and up_bias, those in `needs`.

    options: add_input, activation, backend. direct: a backend's backward of all arguments but the backend, asked first;
    None, or None from it: ask the op.
    """
    need_x, need_wd, need_bd, need_wu, need_bu = needs
    need_down, need_up = need_wd or need_bd, need_wu or need_bu
    if not (need_x or need_down or need_up):
        return None, None, None, None, None
    arguments = (grad_out, *saved, need_x, need_down, need_up, *options)
    made = None if direct is None else direct(*arguments[:-1])
    dx, dwd, dbd, dwu, dbu = routed_adapter_backward_op(*arguments) if made is None else made
    return (
        dx if need_x else None,
        dwd if need_wd else None,
        dbd if need_bd else None,
        dwu if need_wu else None,
        dbu if need_bu else None,
    )


differentiate(routed_adapter_op, RoutedAdapterFunction)
