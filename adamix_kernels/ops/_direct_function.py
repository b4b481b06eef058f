"""The derivative of an op's call past the dispatcher, in Python: of ops/_routed_direct.py and ops/_gated_direct.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ._direct import applied
from ._library import once_differentiable
from ._routed_ops import RoutedOps


class Calls(Protocol):
    """The direct calls of one op: what of the arguments is saved (None: what the forward keeps), learned and added."""

    ops: RoutedOps
    saved: list[int | None]
    learned: Sequence[int]
    added: int

    def run(self, plan: Any, how: tuple[Any, ...], tensors: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """(out, what is kept)."""

    def backward(self, how: tuple[Any, ...]) -> tuple[Callable[..., tuple[torch.Tensor, ...] | None] | None, list[Any]]:
        """(the backend's backward, where it may be asked; the op's options and the backend)."""


class Direct(torch.autograd.Function):
    """The op's derivative on a plan, in place or not; it saves the same tensors.

    how: the backend's direct calls, whether in place, then what `calls` reads of it.
    """

    @staticmethod
    def forward(ctx: Any, calls: Calls, plan: Any, how: tuple[Any, ...], *tensors: Any) -> torch.Tensor:
        out, kept = calls.run(plan, how, tensors)
        if how[1]:
            ctx.mark_dirty(out)
        ctx.save_for_backward(*[kept if n is None else tensors[n] for n in calls.saved])
        ctx.calls, ctx.how = calls, how
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
        needs, calls = ctx.needs_input_grad[3:], ctx.calls
        grads: list[Any] = [None] * len(needs)
        if grad_out is not None:
            backward, options = calls.backward(ctx.how)
            wanted = [needs[n] for n in calls.learned]
            made = calls.ops.gradients(grad_out, ctx.saved_tensors, wanted, options, backward)
            for n, grad in zip(calls.learned, made, strict=True):
                grads[n] = grad
            grads[calls.added] = grad_out if needs[calls.added] else None
        return None, None, None, *grads


apply = applied(Direct)
