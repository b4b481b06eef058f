"""inplace=True: the logits are overwritten by their gradient, in the forward or, where that waits, in backward."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .._library import below_autograd, once_differentiable
from .ahead import adamix_grad, adamix_write, consistency_grad, consistency_write, writer_of
from .op import adamix_loss_op, consistency_op, module_of
from .signatures import AdaMix, Consistency


class InplaceConsistencyFunction(torch.autograd.Function):
    """Saves the overwritten logits: a changed version is autograd's to report."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *args, backend, expected = arguments
        a, needs = Consistency(*args), ctx.needs_input_grad[:2]
        ctx.options, ctx.written = (a.detach_target, backend), None
        module = writer_of(backend, expected, a.logits_a, a.logits_b)
        if module is not None:
            ctx.written = expected or 1.0
            da, db = _detached((a.logits_a, a.logits_b), needs)
            loss, stats, scale = consistency_grad(module, a, expected, da, db)
        else:
            loss, stats, scale = below_autograd(consistency_op, *a, backend)
        _save(ctx, (a.logits_a, a.logits_b, a.mask, stats, scale), needs)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        detach_target, backend = ctx.options
        saved = _spend(ctx)
        out, module = _detached(saved, ctx.needs_input_grad[:2]), module_of(backend, saved[0])
        if ctx.written is None:
            consistency_write(module, grad, saved, detach_target, (out[0], out[1]), None)
        return *_right(ctx, grad, out, module), *[None] * 5


class InplaceAdaMixLossFunction(torch.autograd.Function):
    """As InplaceConsistencyFunction."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *args, backend, expected = arguments
        a = AdaMix(*args)
        ctx.options, ctx.written = (*a[4:], backend), None
        module = writer_of(backend, expected, a.logits)
        if module is not None:
            ctx.written = expected or 1.0
            *losses, stats, scales = adamix_grad(module, a, expected, a.logits.detach())
        else:
            *losses, stats, scales = below_autograd(adamix_loss_op, *a, backend)
        _save(ctx, (a.logits, a.labels, a.mask, stats, scales), (True,))
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        *rest, backend = ctx.options
        saved = _spend(ctx)
        out, module = saved[0].detach(), module_of(backend, saved[0])
        if ctx.written is None:
            adamix_write(module, grad, saved, tuple(rest), out, None)
        return *_right(ctx, grad, (out,), module), *[None] * 9


_Tensors = tuple[torch.Tensor | None, ...]


def _detached(logits: tuple[torch.Tensor, ...], needs: tuple[bool, ...]) -> _Tensors:
    return tuple(t.detach() if need else None for t, need in zip(logits, needs))


def _save(ctx: Any, tensors: tuple[torch.Tensor | None, ...], needs: tuple[bool, ...]) -> None:
    """Where the backward writes, the logits count as changed now: what reads them then reads gradients."""
    ctx.save_for_backward(*tensors)
    ctx.spent = False
    ctx.set_materialize_grads(False)
    torch.autograd.graph.increment_version([t for t, need in zip(tensors, needs) if need and t is not None])


def _spend(ctx: Any) -> tuple[torch.Tensor, ...]:
    if ctx.spent:
        raise RuntimeError("inplace: got a second backward, expected one, since the logits are overwritten; use False")
    saved: tuple[torch.Tensor, ...] = ctx.saved_tensors
    ctx.spent = True
    return saved


def _right(ctx: Any, grad: torch.Tensor, out: _Tensors, module: ModuleType) -> _Tensors:
    """The gradients that lie where the logits lay; those that were written for another incoming one are rescaled."""
    for t in out:
        if t is None:
            continue
        if ctx.written is not None:
            module.rescale(t, grad / ctx.written)
        torch.autograd.graph.increment_version(t)
    return out


# torch gives apply no types.
inplace_adamix_loss: Callable[..., Any] = InplaceAdaMixLossFunction.apply
inplace_consistency: Callable[..., Any] = InplaceConsistencyFunction.apply
