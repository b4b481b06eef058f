"""Derivative of gated LoRA, in terms of its forward and backward ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._library import as_base, below_autograd, differentiate, once_differentiable, records
from .op import gated_lora_backward_op, gated_lora_inplace_op
from .op import gated_lora_op as gated_lora_op


class GatedLoRAFunction(torch.autograd.Function):
    """Saves x, t [B, S, slots * groups*r], the banks, the gates, the scales and the seed; the mask is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        a_index: torch.Tensor | None,
        b_index: torch.Tensor | None,
        gates: torch.Tensor,
        scales: torch.Tensor | None,
        base: torch.Tensor | None,
        seed: torch.Tensor | None,
        *options: Any,
    ) -> Any:
        out, t = below_autograd(gated_lora_op, x, lora_a, lora_b, a_index, b_index, gates, scales, base, seed, *options)
        ctx.save_for_backward(x, t, lora_a, lora_b, a_index, b_index, gates, scales, seed)
        ctx.options = options
        ctx.mark_non_differentiable(t)
        ctx.set_materialize_grads(False)
        return as_base(out), t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, _grad_t: torch.Tensor | None) -> tuple[Any, ...]:
        return _of_arguments(ctx, grad_out)


class GatedLoRAInPlaceFunction(torch.autograd.Function):
    """The same, the output written over base [..., N]; what is saved does not include base."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        a_index: torch.Tensor | None,
        b_index: torch.Tensor | None,
        gates: torch.Tensor,
        scales: torch.Tensor | None,
        base: torch.Tensor,
        seed: torch.Tensor | None,
        *options: Any,
    ) -> torch.Tensor:
        t = below_autograd(
            gated_lora_inplace_op, x, lora_a, lora_b, a_index, b_index, gates, scales, base, seed, *options
        )
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, t, lora_a, lora_b, a_index, b_index, gates, scales, seed)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
        return _of_arguments(ctx, grad_out)


def _of_arguments(ctx: Any, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
    """The gradients of the nine tensors and, None, of the six options."""
    if grad_out is None:
        return (None,) * 15
    need_x, need_a, need_b, _, _, need_gates, _, need_base, *_ = ctx.needs_input_grad
    needs = need_x, need_a, need_b, need_gates
    dx = da = db = dgates = None
    if any(needs):
        saved = ctx.saved_tensors
        x = saved[0]
        rows = grad_out if grad_out.shape[:-1] == x.shape[:-1] else grad_out.reshape(*x.shape[:2], grad_out.shape[-1])
        grads = gated_lora_backward_op(rows, *saved, *needs, *ctx.options)
        dx, da, db, dgates = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dx, da, db, None, None, dgates, None, grad_out if need_base else None, None, *(None,) * 6


differentiate(gated_lora_op, GatedLoRAFunction)


def gated_lora_inplace(*args: Any) -> torch.Tensor:
    """gated_lora_inplace_op with its derivative: base, overwritten; see routed_lora_inplace."""
    if records(args):
        apply: Callable[..., torch.Tensor] = GatedLoRAInPlaceFunction.apply
        return apply(*args)
    below_autograd(gated_lora_inplace_op, *args)
    base: torch.Tensor = args[7]
    return base
