"""Derivative of routed LoRA, in terms of its forward and backward ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._library import as_base, below_autograd, differentiate, gradients_of, once_differentiable, records
from .op import routed_lora_backward_op, routed_lora_inplace_op
from .op import routed_lora_op as routed_lora_op
from .signatures import Forward

_BASE, _FIRST_OPTION = Forward._fields.index("base"), Forward._fields.index("scaling")


def _save(ctx: Any, arguments: tuple[Any, ...], t: torch.Tensor) -> None:
    """x, t = dropout(x) A^T [B, S, groups*r], the banks and the seed; the mask is recomputed."""
    a = Forward(*arguments[:-1])
    ctx.save_for_backward(a.x, t, a.lora_a, a.lora_b, a.a_index, a.b_index, a.seed)
    ctx.options = arguments[_FIRST_OPTION:]
    ctx.set_materialize_grads(False)


class RoutedLoRAFunction(torch.autograd.Function):
    """routed_lora_op with its derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        out, t = below_autograd(routed_lora_op, *arguments)
        _save(ctx, arguments, t)
        ctx.mark_non_differentiable(t)
        return as_base(out), t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, _grad_t: torch.Tensor | None) -> tuple[Any, ...]:
        return _of_arguments(ctx, grad_out)


class RoutedLoRAInPlaceFunction(torch.autograd.Function):
    """The same, the output written over base [..., N], which is not saved."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        t = below_autograd(routed_lora_inplace_op, *arguments)
        _save(ctx, arguments, t)
        base = arguments[_BASE]
        ctx.mark_dirty(base)
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
        return _of_arguments(ctx, grad_out)


def _of_arguments(ctx: Any, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:
        return gradients_of(Forward)
    needs = ctx.needs_input_grad
    dx, da, db = gradients(grad_out, ctx.saved_tensors, needs[:3], ctx.options, None)
    return gradients_of(Forward, x=dx, lora_a=da, lora_b=db, base=grad_out if needs[_BASE] else None)


def gradients(
    grad_out: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    needs: tuple[bool, ...],
    options: tuple[Any, ...],
    direct: Callable[..., tuple[torch.Tensor, ...] | None] | None,
) -> tuple[torch.Tensor | None, ...]:
    """Of x, lora_a and lora_b, those in `needs`.

    options: scaling to backend. direct: a backend's backward, asked first; None from it: ask the op.
    """
    if not any(needs):
        return None, None, None
    x = saved[0]
    same = grad_out.shape[:-1] == x.shape[:-1]
    rows = grad_out if same else grad_out.reshape(*x.shape[:2], grad_out.shape[-1])
    arguments = (rows, *saved, *needs, *options)
    made = None if direct is None else direct(*arguments[:-1])
    dx, da, db = routed_lora_backward_op(*arguments) if made is None else made
    return dx if needs[0] else None, da if needs[1] else None, db if needs[2] else None


differentiate(routed_lora_op, RoutedLoRAFunction)


def routed_lora_inplace(*args: Any) -> torch.Tensor:
    """routed_lora_inplace_op with its derivative: base, overwritten.

    base may not be a view where a gradient is recorded: autograd takes the first argument for the view rewritten.
    """
    if records(args):
        apply: Callable[..., torch.Tensor] = RoutedLoRAInPlaceFunction.apply
        return apply(*args)
    below_autograd(routed_lora_inplace_op, *args)
    base: torch.Tensor = args[_BASE]
    return base
