"""Derivative of gated LoRA, in terms of its forward and backward ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._library import as_base, below_autograd, differentiate, gradients_of, once_differentiable, records
from .op import gated_lora_backward_op, gated_lora_inplace_op
from .op import gated_lora_op as gated_lora_op
from .signatures import Forward

_FIRST_OPTION = Forward._fields.index("scaling")


def _save(ctx: Any, arguments: tuple[Any, ...], t: torch.Tensor) -> None:
    """x, t [B, S, slots * groups*r], the banks, the gates, the scales and the seed; the mask is recomputed."""
    a = Forward(*arguments[:-1])
    ctx.save_for_backward(a.x, t, a.lora_a, a.lora_b, a.a_index, a.b_index, a.gates, a.scales, a.seed)
    ctx.options = arguments[_FIRST_OPTION:]
    ctx.set_materialize_grads(False)


class GatedLoRAFunction(torch.autograd.Function):
    """gated_lora_op with its derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        out, t = below_autograd(gated_lora_op, *arguments)
        _save(ctx, arguments, t)
        ctx.mark_non_differentiable(t)
        return as_base(out), t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, _grad_t: torch.Tensor | None) -> tuple[Any, ...]:
        return _of_arguments(ctx, grad_out)


class GatedLoRAInPlaceFunction(torch.autograd.Function):
    """The same, the output written over base [..., N], which is not saved."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        t = below_autograd(gated_lora_inplace_op, *arguments)
        _save(ctx, arguments, t)
        base = Forward(*arguments[:-1]).base
        ctx.mark_dirty(base)
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
        return _of_arguments(ctx, grad_out)


def _of_arguments(ctx: Any, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:
        return gradients_of(Forward)
    need: Any = Forward(*ctx.needs_input_grad[:-1])
    needs = need.x, need.lora_a, need.lora_b, need.gates
    dx = da = db = dgates = None
    if any(needs):
        saved = ctx.saved_tensors
        x = saved[0]
        rows = grad_out if grad_out.shape[:-1] == x.shape[:-1] else grad_out.reshape(*x.shape[:2], grad_out.shape[-1])
        grads = gated_lora_backward_op(rows, *saved, *needs, *ctx.options)
        dx, da, db, dgates = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    base = grad_out if need.base else None
    return gradients_of(Forward, x=dx, lora_a=da, lora_b=db, gates=dgates, base=base)


differentiate(gated_lora_op, GatedLoRAFunction)


def gated_lora_inplace(*arguments: Any) -> torch.Tensor:
    """gated_lora_inplace_op with its derivative: base, overwritten; see routed_lora_inplace."""
    if records(arguments):
        apply: Callable[..., torch.Tensor] = GatedLoRAInPlaceFunction.apply
        return apply(*arguments)
    below_autograd(gated_lora_inplace_op, *arguments)
    base: torch.Tensor = arguments[Forward._fields.index("base")]
    return base
