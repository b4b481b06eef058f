"""Derivative of routed LoRA, in terms of its forward and backward ops."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .._library import below_autograd, differentiate, records
from .op import routed_lora_backward_op, routed_lora_inplace_op, routed_lora_op


class RoutedLoRAFunction(torch.autograd.Function):
    """Saves x, t = dropout(x) A^T [B, S, groups*r], the banks and the seed; the mask is recomputed."""

    @staticmethod
    def forward(
        ctx, x, lora_a, lora_b, a_index, b_index, base, seed, scaling, groups, offsets, dropout_p, backend
    ):  # fmt: skip
        out, t = below_autograd(
            routed_lora_op, x, lora_a, lora_b, a_index, b_index, base, seed,
            scaling, groups, offsets, dropout_p, backend,
        )  # fmt: skip
        ctx.save_for_backward(x, t, lora_a, lora_b, a_index, b_index, seed)
        ctx.options = (scaling, groups, offsets, dropout_p, backend)
        ctx.mark_non_differentiable(t)
        ctx.set_materialize_grads(False)
        return out, t

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _grad_t):
        return _gradients(ctx, grad_out)


class RoutedLoRAInPlaceFunction(torch.autograd.Function):
    """The same, the output written over base [..., N]; what is saved does not include base."""

    @staticmethod
    def forward(
        ctx, x, lora_a, lora_b, a_index, b_index, base, seed, scaling, groups, offsets, dropout_p, backend
    ):  # fmt: skip
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
    def backward(ctx, grad_out):
        return _gradients(ctx, grad_out)


def _gradients(ctx, grad_out):
    if grad_out is None:
        return (None,) * 12
    x, t, lora_a, lora_b, a_index, b_index, seed = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    dx = da = db = None
    if any(wanted):
        rows = grad_out.reshape(*x.shape[:2], grad_out.shape[-1])
        grads = routed_lora_backward_op(rows, x, t, lora_a, lora_b, a_index, b_index, seed, *wanted, *ctx.options)
        dx, da, db = (g if w else None for g, w in zip(grads, wanted, strict=True))
    dbase = grad_out if ctx.needs_input_grad[5] else None
    return dx, da, db, None, None, dbase, None, None, None, None, None, None


differentiate(routed_lora_op, RoutedLoRAFunction)


def routed_lora_inplace(*args) -> torch.Tensor:
    """routed_lora_inplace_op with its derivative: base, overwritten.

    base may not be a view where a gradient is recorded: autograd takes the first argument for the view rewritten.
    """
    if records(args):
        return RoutedLoRAInPlaceFunction.apply(*args)
    below_autograd(routed_lora_inplace_op, *args)
    return args[5]
