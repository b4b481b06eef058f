"""Derivative of routed LoRA, in terms of its forward and backward ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .._library import as_base, below_autograd, differentiate, records
from .op import routed_lora_backward_op, routed_lora_inplace_op
from .op import routed_lora_op as routed_lora_op


class RoutedLoRAFunction(torch.autograd.Function):
    """Saves x, t = dropout(x) A^T [B, S, groups*r], the banks and the seed; the mask is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        a_index: torch.Tensor | None,
        b_index: torch.Tensor | None,
        base: torch.Tensor | None,
        seed: torch.Tensor | None,
        scaling: float,
        groups: int,
        offsets: list[int],
        dropout_p: float,
        backend: str,
    ) -> Any:
        out, t = below_autograd(
            routed_lora_op, x, lora_a, lora_b, a_index, b_index, base, seed,
            scaling, groups, offsets, dropout_p, backend,
        )  # fmt: skip
        ctx.save_for_backward(x, t, lora_a, lora_b, a_index, b_index, seed)
        ctx.options = (scaling, groups, offsets, dropout_p, backend)
        ctx.mark_non_differentiable(t)
        ctx.set_materialize_grads(False)
        return as_base(out), t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, _grad_t: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _of_arguments(ctx, grad_out)


class RoutedLoRAInPlaceFunction(torch.autograd.Function):
    """The same, the output written over base [..., N]; what is saved does not include base."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        a_index: torch.Tensor | None,
        b_index: torch.Tensor | None,
        base: torch.Tensor | None,
        seed: torch.Tensor | None,
        scaling: float,
        groups: int,
        offsets: list[int],
        dropout_p: float,
        backend: str,
    ) -> Any:
        t = below_autograd(
            routed_lora_inplace_op, x, lora_a, lora_b, a_index, b_index, base, seed,
            scaling, groups, offsets, dropout_p, backend,
        )  # fmt: skip
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, t, lora_a, lora_b, a_index, b_index, seed)
        ctx.options = (scaling, groups, offsets, dropout_p, backend)
        ctx.set_materialize_grads(False)
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _of_arguments(ctx, grad_out)


def _of_arguments(ctx: Any, grad_out: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 12
    needs = ctx.needs_input_grad
    grads = gradients(grad_out, ctx.saved_tensors, needs[:3], ctx.options, None)
    return *grads, None, None, grad_out if needs[5] else None, None, None, None, None, None, None


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
    return args[5]
