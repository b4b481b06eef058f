"""inplace=True: the logits are overwritten by their gradient, in the forward or, where that waits, in backward."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..._backends import select
from .._library import below_autograd, once_differentiable
from .ahead import adamix_grad, adamix_write, consistency_grad, consistency_write, writer_of
from .op import adamix_loss_op, consistency_op


class InplaceConsistencyFunction(torch.autograd.Function):
    """Saves the overwritten logits: a changed version is autograd's to report."""

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
    ) -> Any:
        args = logits_a, logits_b, mask, detach_target, reduction, backend
        needs = ctx.needs_input_grad[:2]
        ctx.options, ctx.written = (detach_target, backend), None
        module = writer_of(backend, expected, logits_a, logits_b)
        if module is not None:
            ctx.written = expected or 1.0
            over = _detached((logits_a, logits_b), needs)
            loss, stats, scale = consistency_grad(module, *args[:-1], expected, *over)
        else:
            loss, stats, scale = below_autograd(consistency_op, *args)
        _save(ctx, (logits_a, logits_b, mask, stats, scale), needs)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        detach_target, backend = ctx.options
        saved = _spend(ctx)
        out, module = _detached(saved, ctx.needs_input_grad[:2]), _module(saved, backend)
        if ctx.written is None:
            consistency_write(module, grad, saved, detach_target, (out[0], out[1]), None)
        return *_right(ctx, grad, out, module), *[None] * 5


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
        *rest, backend, expected = options
        args: tuple[Any, ...] = (logits, labels, mask, num_items, *rest)
        ctx.options, ctx.written = (*rest, backend), None
        module = writer_of(backend, expected, logits)
        if module is not None:
            ctx.written = expected or 1.0
            args = (module, *args, expected, logits.detach())
            *losses, stats, scales = adamix_grad(*args)
        else:
            *losses, stats, scales = below_autograd(adamix_loss_op, *args, backend)
        _save(ctx, (logits, labels, mask, stats, scales), (True,))
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        *rest, backend = ctx.options
        saved = _spend(ctx)
        out, module = saved[0].detach(), _module(saved, backend)
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


def _module(saved: tuple[torch.Tensor, ...], backend: str) -> ModuleType:
    return select("consistency", backend, saved[0].device, saved[0].dtype, saved[0].shape[-1])


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
