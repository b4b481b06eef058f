"""Derivative of the routed adapter, in terms of its forward and backward ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._library import as_base, below_autograd, differentiate, gradients_of, once_differentiable
from .op import routed_adapter_backward_op
from .op import routed_adapter_op as routed_adapter_op
from .signatures import Forward

_FIRST_OPTION = Forward._fields.index("add_input")


class RoutedAdapterFunction(torch.autograd.Function):
    """Saves x, the pre-activation [B, S, r] and the banks; everything else is recomputed."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, pre = below_autograd(routed_adapter_op, *arguments)
        a = Forward(*arguments[:-1])
        ctx.save_for_backward(a.x, pre, a.down_weight, a.up_weight, a.down_index, a.up_index)
        ctx.options = arguments[_FIRST_OPTION:]
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        return as_base(out), pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, _grad_pre: torch.Tensor | None) -> tuple[Any, ...]:
        if grad_out is None:
            return gradients_of(Forward)
        needs = ctx.needs_input_grad
        grads = gradients(grad_out, ctx.saved_tensors, needs[:5], ctx.options, None)
        residual = grad_out if needs[Forward._fields.index("residual")] else None
        return gradients_of(Forward, **dict(zip(Forward._fields, grads)), residual=residual)


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
