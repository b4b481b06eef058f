"""Derivative of the mixture: one node, in terms of its forward and backward ops."""

from __future__ import annotations

from typing import Any

import torch

from .._library import as_base, below_autograd, differentiate, gradients_of, once_differentiable, records
from .op import mixture_lora_backward_op, mixture_lora_inplace_op
from .op import mixture_lora_op as mixture_lora_op
from .signatures import Forward

# What x, lora_a, lora_b and router are among the arguments, and base.
_LEARNED, _BASE = slice(0, 4), Forward._fields.index("base")


def _save(ctx: Any, arguments: tuple[Any, ...], kept: tuple[torch.Tensor, ...]) -> None:
    """kept: t, gates and ids. Dropout's mask is recomputed."""
    given = Forward(*arguments[:-1])
    ctx.save_for_backward(*arguments[_LEARNED], *kept, given.seed)
    ctx.options = arguments[Forward._fields.index("top_k") :]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Any, grad_gates: Any, grad_logits: Any) -> tuple[torch.Tensor | None, ...]:
    needs = ctx.needs_input_grad
    through = grad_out is not None
    wanted = needs[0], needs[1] and through, needs[2] and through, needs[3]
    base = grad_out if needs[_BASE] else None
    routes = (needs[0] or needs[3]) and (through or grad_gates is not None or grad_logits is not None)
    if not (routes or wanted[1] or wanted[2]):
        return gradients_of(Forward, base=base)
    # Once: activation checkpointing makes them anew.
    saved = ctx.saved_tensors
    x = saved[0]
    if through and grad_out.shape[:-1] != x.shape[:-1]:
        grad_out = grad_out.reshape(*x.shape[:2], grad_out.shape[-1])
    made = mixture_lora_backward_op(grad_out, grad_gates, grad_logits, *saved, *wanted, *ctx.options)
    found = (grad if want else None for grad, want in zip(made, wanted, strict=True))
    return gradients_of(Forward, **dict(zip(Forward._fields[_LEARNED], found, strict=True)), base=base)


class MixtureFunction(torch.autograd.Function):
    """Saves x, the banks, the router, the narrow values, the gates and the ids."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        out, t, gates, index, logits = below_autograd(mixture_lora_op, *arguments)
        _save(ctx, arguments, (t, gates, index))
        ctx.mark_non_differentiable(t, index)
        return as_base(out), t, gates, index, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Any, _grad_t: Any, grad_gates: Any, _grad_index: Any, grad_logits: Any
    ) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, grad_out, grad_gates, grad_logits)


class MixtureInPlace(torch.autograd.Function):
    """The same, the output written over base [..., N], which is not saved."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        t, gates, index, logits = below_autograd(mixture_lora_inplace_op, *arguments)
        _save(ctx, arguments, (t, gates, index))
        base: torch.Tensor = arguments[_BASE]
        ctx.mark_dirty(base)
        ctx.mark_non_differentiable(index)
        return base, gates, index, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Any, grad_gates: Any, _grad_index: Any, grad_logits: Any
    ) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, grad_out, grad_gates, grad_logits)


def mixture_inplace(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """(base, overwritten, gates, ids, logits), with the derivative. base may not be a view where autograd records."""
    if records(arguments):
        made: tuple[torch.Tensor, ...] = MixtureInPlace.apply(*arguments)  # type: ignore[no-untyped-call]
        return made
    _, gates, index, logits = below_autograd(mixture_lora_inplace_op, *arguments)
    return arguments[_BASE], gates, index, logits


differentiate(mixture_lora_op, MixtureFunction)
