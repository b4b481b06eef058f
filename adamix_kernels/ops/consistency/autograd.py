"""Derivatives of the consistency losses, in terms of their forward and backward ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .._library import below_autograd, differentiate
from .grad_op import (
    adamix_loss_correct_op,
    adamix_loss_grad_op,
    consistency_correct_op,
    consistency_grad_op,
    loss_rescale_op,
    writes_gradient,
)
from .op import (
    adamix_loss_backward_op,
    consistency_backward_op,
)
from .op import (
    adamix_loss_op as adamix_loss_op,
)
from .op import (
    consistency_op as consistency_op,
)
from .op import (
    linear_adamix_loss_op as linear_adamix_loss_op,
)


class ConsistencyFunction(torch.autograd.Function):
    """Saves both logits and the row statistics; probabilities are recomputed.

    Where the backend writes the gradient in the forward, backward hands that buffer over, once; a later backward
    through a retained graph computes anew.
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
    ) -> Any:
        args = logits_a, logits_b, mask, detach_target, reduction
        ctx.ahead = None
        if reduction != "none" and writes_gradient(logits_a, backend) and writes_gradient(logits_b, backend):
            ctx.ahead = [_empty_like(t) if need else None for t, need in zip(args[:2], ctx.needs_input_grad)]
            loss, stats, scale, _ = below_autograd(consistency_grad_op, *args, *ctx.ahead, backend)
        else:
            loss, stats, scale = below_autograd(consistency_op, *args, backend)
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
        ahead, ctx.ahead = ctx.ahead, None
        detach_target, backend = ctx.options
        if ahead is not None:
            consistency_correct_op(grad, *ctx.saved_tensors, detach_target, *ahead, backend)
            return *ahead, None, None, None, None
        grads = consistency_backward_op(grad, *ctx.saved_tensors, *ctx.options)
        ga, gb = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True))
        return ga, gb, None, None, None, None


class AdaMixLossFunction(torch.autograd.Function):
    """Saves the logits and the row statistics; the gradient as in ConsistencyFunction."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        num_items: torch.Tensor | None,
        *options: Any,
    ) -> Any:
        ctx.ahead = None
        if writes_gradient(logits, options[-1]):
            ctx.ahead = _empty_like(logits)
            args = logits, labels, mask, num_items, *options[:-1], ctx.ahead, options[-1]
            *losses, stats, scales, _ = below_autograd(adamix_loss_grad_op, *args)
        else:
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
        ahead, ctx.ahead = ctx.ahead, None
        if ahead is None:
            return adamix_loss_backward_op(grad, *ctx.saved_tensors, *ctx.options), *[None] * 8
        adamix_loss_correct_op(grad, *ctx.saved_tensors, *ctx.options[:-1], ahead, ctx.options[-1])
        return ahead, *[None] * 8


class InplaceConsistencyFunction(torch.autograd.Function):
    """The logits are overwritten by their gradient, and saved as such; a changed version is autograd's to report."""

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
        needs = ctx.needs_input_grad[:2]
        over = [t.detach() if need else None for t, need in zip((logits_a, logits_b), needs, strict=True)]
        args = logits_a, logits_b, mask, detach_target, reduction, *over, backend
        loss, _, _, factor = below_autograd(consistency_grad_op, *args)
        _keep_overwritten(ctx, factor, backend, *(t if need else None for t, need in zip((logits_a, logits_b), needs)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return *_take_overwritten(ctx, grad, 2), None, None, None, None


class InplaceAdaMixLossFunction(torch.autograd.Function):
    """As InplaceConsistencyFunction."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        num_items: torch.Tensor | None,
        *options: Any,
    ) -> Any:
        args = logits, labels, mask, num_items, *options[:-1], logits.detach(), options[-1]
        *losses, _, _, factor = below_autograd(adamix_loss_grad_op, *args)
        _keep_overwritten(ctx, factor, options[-1], logits)
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return *_take_overwritten(ctx, grad, 1), *[None] * 8


def _keep_overwritten(ctx: Any, factor: torch.Tensor, backend: str, *logits: torch.Tensor | None) -> None:
    ctx.save_for_backward(factor, *logits)
    ctx.backend, ctx.spent = backend, False
    ctx.set_materialize_grads(False)
    torch.autograd.graph.increment_version([t for t in logits if t is not None])


def _take_overwritten(ctx: Any, grad: torch.Tensor | None, count: int) -> Sequence[torch.Tensor | None]:
    if grad is None:
        return (None,) * count
    if ctx.spent:
        raise RuntimeError("inplace: got a second backward, expected one, since the logits are overwritten; use False")
    factor, *gradients = ctx.saved_tensors
    gradients = [None if t is None else t.detach() for t in gradients]
    ctx.spent = True
    for t in gradients:
        if t is not None:
            loss_rescale_op(t, grad * factor, ctx.backend)
            torch.autograd.graph.increment_version(t)
    return gradients


def _empty_like(logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(logits.shape)


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
inplace_adamix_loss: Callable[..., Any] = InplaceAdaMixLossFunction.apply
inplace_consistency: Callable[..., Any] = InplaceConsistencyFunction.apply
