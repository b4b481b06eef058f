"""Derivatives of the consistency losses: of the ops, in two steps, and of eager calls, whose forward writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._direct import applied, may_be_direct
from .._library import below_autograd, differentiate, gradients_of, once_differentiable
from .ahead import adamix_grad, adamix_write, consistency_grad, consistency_write, writer_of
from .op import (
    adamix_loss_backward_op,
    adamix_loss_op,
    consistency_backward_op,
    consistency_op,
    module_of,
)
from .op import linear_adamix_loss_op as linear_adamix_loss_op
from .signatures import AdaMix, Consistency, Linear

_DENSE = torch.contiguous_format


def consistency(*arguments: Any) -> torch.Tensor:
    """Of Consistency, the backend and the expected gradient."""
    *given, backend, expected = arguments
    a = Consistency(*given)
    logits = a.logits_a, a.logits_b
    needed = a.reduction != "none" and torch.is_grad_enabled() and any(t.requires_grad for t in logits)
    if needed and writer_of(backend, expected, *logits) is not None:
        loss: torch.Tensor = _ahead_consistency(*logits, a.mask, (backend, *a[3:], expected), None)
        return loss
    return consistency_op(*a, backend)[0]


def adamix(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """Of AdaMix, the backend and the expected gradient."""
    *given, backend, expected = arguments
    a = AdaMix(*given)
    ahead = torch.is_grad_enabled() and a.logits.requires_grad and writer_of(backend, expected, a.logits) is not None
    if not ahead:
        return adamix_loss_op(*a, backend)[:3]
    parts: list[torch.Tensor] = []
    loss = _ahead_adamix(*a[:3], (backend, *a[3:], expected), parts, None)
    return loss, *parts


class ConsistencyFunction(torch.autograd.Function):
    """Saves both logits and the row statistics; probabilities are recomputed."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        loss, stats, scale = below_autograd(consistency_op, *arguments)
        logits_a, logits_b, mask, detach_target, _, backend = arguments
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
            return gradients_of(Consistency)
        grads = consistency_backward_op(grad, *ctx.saved_tensors, *ctx.options)
        ga, gb = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True))
        return gradients_of(Consistency, logits_a=ga, logits_b=gb)


class AdaMixLossFunction(torch.autograd.Function):
    """Saves the logits and the row statistics."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *losses, stats, scales = below_autograd(adamix_loss_op, *arguments)
        logits, labels, mask, _, *options = arguments
        ctx.save_for_backward(logits, labels, mask, stats, scales)
        ctx.options = options
        ctx.mark_non_differentiable(*losses[1:], stats, scales)
        ctx.set_materialize_grads(False)
        return *losses, stats, scales

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return gradients_of(AdaMix)
        return gradients_of(AdaMix, logits=adamix_loss_backward_op(grad, *ctx.saved_tensors, *ctx.options))


class AheadConsistencyFunction(torch.autograd.Function):
    """The forward writes the gradients; backward hands them over, once. A later backward through a retained graph
    computes anew. options: the backend, detach_target, reduction, the expected gradient. planned: None, or a plan
    (direct.py) and whether it writes the gradients.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        logits_a, logits_b, mask, options, planned = arguments
        ctx.options = options
        plan, ahead = planned or (None, True)
        made = None if plan is None else plan(logits_a, logits_b, mask)
        if made is None:
            out = _places(ctx, logits_a, logits_b) if ahead else (None, None)
            backend, *rest, expected = options
            module = module_of(backend, logits_a)
            a = Consistency(logits_a, logits_b, mask, *rest)
            made = (*consistency_grad(module, a, expected, *out), *(g for g in out if g is not None))
        loss: torch.Tensor
        loss, stats, scale, *grads = made
        ctx.ahead = tuple([grads.pop(0) if need else None for need in ctx.needs_input_grad[:2]]) if ahead else None
        ctx.save_for_backward(logits_a, logits_b, mask, stats, scale)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, detach_target, *_ = ctx.options
        saved, out, written, module, direct = _to_write(ctx, lambda saved: _places(ctx, *saved[:2]))
        if direct is None or direct.consistency_backward(grad, *saved, *out, detach_target, written) is None:
            consistency_write(module, grad, saved, detach_target, out, written)
        return *out, None, None, None


class AheadAdaMixFunction(torch.autograd.Function):
    """As AheadConsistencyFunction. options: the backend, num_items, weight, ignore_index, label_smoothing,
    detach_target, the expected gradient. parts: takes the cross-entropy and the consistency.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        logits, labels, mask, options, parts, planned = arguments
        backend, num_items, *rest, expected = ctx.options = options
        plan, ahead = planned or (None, True)
        made = None if plan is None else plan(logits, labels, mask, num_items)
        if made is None:
            out = torch.empty_like(logits, memory_format=_DENSE) if ahead else None
            a = AdaMix(logits, labels, mask, num_items, *rest)
            made = (*adamix_grad(module_of(backend, logits), a, expected, out), out)
        loss: torch.Tensor
        loss, cross_entropy, consistency, stats, scales, *grads = made
        ctx.ahead = grads[0] if ahead else None
        parts += cross_entropy, consistency
        ctx.save_for_backward(logits, labels, mask, stats, scales)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, _, *options, _ = ctx.options
        saved, out, written, module, direct = _to_write(
            ctx, lambda saved: torch.empty_like(saved[0], memory_format=_DENSE)
        )
        if direct is None or direct.adamix_backward(grad, *saved, out, *options, written) is None:
            adamix_write(module, grad, saved, tuple(options), out, written)
        return out, None, None, None, None, None


def _to_write(ctx: Any, new: Callable[[Any], Any]) -> tuple[Any, ...]:
    """(what was saved, where the gradient goes, for which incoming one it lies there or None, the module, its direct
    calls). new: makes the place of saved tensors.
    """
    saved = ctx.saved_tensors
    out, ctx.ahead = ctx.ahead, None
    written = None if out is None else ctx.options[-1] or 1.0
    module = module_of(ctx.options[0], saved[0])
    direct = getattr(module, "direct", None) if may_be_direct() else None
    return saved, new(saved) if out is None else out, written, module, direct


def _places(ctx: Any, *logits: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """New memory for the gradients of those that require one."""
    needs = ctx.needs_input_grad
    return tuple([torch.empty_like(t, memory_format=_DENSE) if need else None for t, need in zip(logits, needs)])


class LinearAdaMixLossFunction(torch.autograd.Function):
    """Saves the gradients that the forward computed; backward only scales them, into new tensors."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        loss, cross_entropy, consistency, *grads, scale = below_autograd(linear_adamix_loss_op, *arguments)
        ctx.save_for_backward(*grads, scale)
        ctx.dtypes = [None if t is None else t.dtype for t in arguments[:3]]
        ctx.mark_non_differentiable(cross_entropy, consistency, *grads, scale)
        ctx.set_materialize_grads(False)
        return loss, cross_entropy, consistency, *grads, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return gradients_of(Linear)
        *grads, scale = ctx.saved_tensors
        factor = grad * scale
        scaled = (
            (g.to(factor.dtype) * factor).to(dtype) if need else None
            for g, dtype, need in zip(grads, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        )
        return gradients_of(Linear, **dict(zip(Linear._fields, scaled)))


differentiate(consistency_op, ConsistencyFunction)
differentiate(adamix_loss_op, AdaMixLossFunction)
differentiate(linear_adamix_loss_op, LinearAdaMixLossFunction)

# torch gives apply no types.
_ahead_adamix: Callable[..., Any] = AheadAdaMixFunction.apply
_ahead_consistency: Callable[..., Any] = AheadConsistencyFunction.apply
apply_adamix, apply_consistency = applied(AheadAdaMixFunction), applied(AheadConsistencyFunction)
