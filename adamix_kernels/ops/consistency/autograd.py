"""Derivatives of the consistency losses: of the ops, in two steps, and of eager calls, whose forward writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .._library import below_autograd, differentiate, records
from .ahead import adamix_grad, adamix_write, consistency_grad, consistency_write, writes_gradient
from .op import (
    adamix_loss_backward_op,
    adamix_loss_op,
    consistency_backward_op,
    consistency_op,
)
from .op import (
    linear_adamix_loss_op as linear_adamix_loss_op,
)


def consistency(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    reduction: str,
    backend: str,
    expected: float | None,
) -> torch.Tensor:
    args = logits_a, logits_b, mask, detach_target, reduction, backend
    if reduction != "none" and records(args) and writes_gradient(backend, expected, logits_a, logits_b):
        loss: torch.Tensor = _ahead_consistency(*args, expected)
    else:
        loss, *_ = consistency_op(*args)
    return loss


def adamix(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    backend: str,
    expected: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    args = logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target, backend
    if records((logits,)) and writes_gradient(backend, expected, logits):
        loss, cross_entropy, divergence = _ahead_adamix(*args, expected)
    else:
        loss, cross_entropy, divergence, *_ = adamix_loss_op(*args)
    return loss, cross_entropy, divergence


class ConsistencyFunction(torch.autograd.Function):
    """Saves both logits and the row statistics; probabilities are recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_a: torch.Tensor,
        logits_b: torch.Tensor,
        mask: torch.Tensor | None,
        detach_target: bool,
        reduction: str,
        backend: str,
    ) -> Any:
        args = logits_a, logits_b, mask, detach_target, reduction, backend
        loss, stats, scale = below_autograd(consistency_op, *args)
        ctx.save_for_backward(logits_a, logits_b, mask, stats, scale)
        ctx.options = (detach_target, backend)
        ctx.mark_non_differentiable(stats, scale)
        ctx.set_materialize_grads(False)
        return loss, stats, scale

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor | None, _grad_stats: torch.Tensor | None, _grad_scale: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        grads = consistency_backward_op(grad, *ctx.saved_tensors, *ctx.options)
        ga, gb = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True))
        return ga, gb, None, None, None, None


class AdaMixLossFunction(torch.autograd.Function):
    """Saves the logits and the row statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        num_items: torch.Tensor | None,
        *options: Any,
    ) -> Any:
        *losses, stats, scales = below_autograd(adamix_loss_op, logits, labels, mask, num_items, *options)
        ctx.save_for_backward(logits, labels, mask, stats, scales)
        ctx.options = options
        ctx.mark_non_differentiable(*losses[1:], stats, scales)
        ctx.set_materialize_grads(False)
        return *losses, stats, scales

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        return adamix_loss_backward_op(grad, *ctx.saved_tensors, *ctx.options), *[None] * 8


class AheadConsistencyFunction(torch.autograd.Function):
    """The forward writes the gradients; backward hands them over, once. A later backward through a retained graph
    computes anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_a: torch.Tensor,
        logits_b: torch.Tensor,
        mask: torch.Tensor | None,
        detach_target: bool,
        reduction: str,
        backend: str,
        expected: float | None,
    ) -> torch.Tensor:
        args = logits_a, logits_b, mask, detach_target, reduction, backend, expected
        ctx.ahead = _places(ctx, logits_a, logits_b)
        loss, stats, scale = consistency_grad(*args, *ctx.ahead)
        ctx.save_for_backward(logits_a, logits_b, mask, stats, scale)
        ctx.options = detach_target, backend, expected
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        detach_target, backend, expected = ctx.options
        out, ctx.ahead = ctx.ahead, None
        written = 1.0 if expected is None else expected
        if out is None:
            out, written = _places(ctx, *ctx.saved_tensors[:2]), None
        consistency_write(grad, ctx.saved_tensors, detach_target, backend, out, written)
        return *out, *[None] * 5


class AheadAdaMixFunction(torch.autograd.Function):
    """As AheadConsistencyFunction."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        num_items: torch.Tensor | None,
        *options: Any,
    ) -> Any:
        ctx.ahead = logits.new_empty(logits.shape)
        *losses, stats, scales = adamix_grad(logits, labels, mask, num_items, *options, ctx.ahead)
        ctx.save_for_backward(logits, labels, mask, stats, scales)
        ctx.options = options
        ctx.mark_non_differentiable(*losses[1:])
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        *options, backend, expected = ctx.options
        out, ctx.ahead = ctx.ahead, None
        written = 1.0 if expected is None else expected
        if out is None:
            out, written = torch.empty_like(ctx.saved_tensors[0], memory_format=torch.contiguous_format), None
        adamix_write(grad, ctx.saved_tensors, tuple(options), backend, out, written)
        return out, *[None] * 9


def _places(ctx: Any, *logits: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """New memory for the gradients of those that require one."""
    return tuple(t.new_empty(t.shape) if need else None for t, need in zip(logits, ctx.needs_input_grad))


class LinearAdaMixLossFunction(torch.autograd.Function):
    """Saves the gradients that the forward computed; backward only scales them, into new tensors."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, lm_head_weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
    ) -> Any:
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
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
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

# torch gives apply no types.
_ahead_adamix: Callable[..., Any] = AheadAdaMixFunction.apply
_ahead_consistency: Callable[..., Any] = AheadConsistencyFunction.apply
