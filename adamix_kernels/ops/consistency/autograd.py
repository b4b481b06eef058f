"""Derivatives of the consistency losses, in terms of their forward and backward ops."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .._library import below_autograd, differentiate
from .op import (
    adamix_loss_backward_op,
    adamix_loss_op,
    consistency_backward_op,
    consistency_op,
    linear_adamix_loss_op,
)


class ConsistencyFunction(torch.autograd.Function):
    """Saves both logits and the row statistics; probabilities are recomputed."""

    @staticmethod
    def forward(ctx, logits_a, logits_b, mask, detach_target, reduction, backend):
        loss, stats, scale = below_autograd(
            consistency_op, logits_a, logits_b, mask, detach_target, reduction, backend
        )  # fmt: skip
        ctx.save_for_backward(logits_a, logits_b, mask, stats, scale)
        ctx.options = (detach_target, backend)
        ctx.mark_non_differentiable(stats, scale)
        ctx.set_materialize_grads(False)
        return loss, stats, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _grad_stats, _grad_scale):
        if grad is None:
            return (None,) * 6
        grads = consistency_backward_op(grad, *ctx.saved_tensors, *ctx.options)
        ga, gb = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True))
        return ga, gb, None, None, None, None


class AdaMixLossFunction(torch.autograd.Function):
    """Saves the logits and the row statistics; probabilities are recomputed."""

    @staticmethod
    def forward(ctx, logits, labels, mask, num_items, *options):
        loss, cross_entropy, consistency, stats, scales = below_autograd(
            adamix_loss_op, logits, labels, mask, num_items, *options
        )
        ctx.save_for_backward(logits, labels, mask, stats, scales)
        ctx.options = options
        ctx.mark_non_differentiable(cross_entropy, consistency, stats, scales)
        ctx.set_materialize_grads(False)
        return loss, cross_entropy, consistency, stats, scales

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 9
        return adamix_loss_backward_op(grad, *ctx.saved_tensors, *ctx.options), *[None] * 8


class LinearAdaMixLossFunction(torch.autograd.Function):
    """Saves the gradients that the forward computed; backward only scales them, into new tensors."""

    @staticmethod
    def forward(ctx, hidden, lm_head_weight, bias, *rest):
        loss, cross_entropy, consistency, *grads, scale = below_autograd(
            linear_adamix_loss_op, hidden, lm_head_weight, bias, *rest
        )
        ctx.save_for_backward(*grads, scale)
        ctx.dtypes = (hidden.dtype, lm_head_weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(cross_entropy, consistency, *grads, scale)
        ctx.set_materialize_grads(False)
        return loss, cross_entropy, consistency, *grads, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 15
        *grads, scale = ctx.saved_tensors
        factor = grad * scale
        scaled = (
            (g.to(factor.dtype) * factor).to(dtype) if need else None
            for g, dtype, need in zip(grads, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        )
        return *scaled, *[None] * 12


differentiate(consistency_op, ConsistencyFunction)
differentiate(adamix_loss_op, AdaMixLossFunction)
differentiate(linear_adamix_loss_op, LinearAdaMixLossFunction)
