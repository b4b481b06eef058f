"""Calls of routed LoRA past the dispatcher (ops/_direct.py).

A backend that serves them has an object `direct` in its module:

    find(inplace, *arguments)   a plan for the op's arguments, of a call that `make` was given before, or None
    make(inplace, *arguments)   the same for arguments that api.py has checked; None where the call cannot be planned
    backward(*arguments)        the backward op's result for the backward op's arguments, or None

Instead of the backend the last argument is `passes`: 0, or the number of runs of whole samples that the indices
[passes] are of (ops/_passes.py); all results but what is saved are as without. A plan takes the tensors among the
arguments, x to seed, and gives (out, t), in place (t,); or None: not for these addresses. Which seed is drawn decides
nothing: one that is looked up with stands for all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _checks, _node
from .._direct import applied, below_autograd, may_be_direct, served
from .._library import below_autograd as dispatched
from .._library import once_differentiable
from .._passes import by_pass, fold_passes
from .op import OPS, routed_lora_backward_op, routed_lora_inplace_op, routed_lora_op

_NUMBERS = (int, float)


def call(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    base: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: Sequence[int],
    dropout_p: float,
    backend: str,
    inplace: bool,
    passes: int,
    checked: bool,
    seed: Callable[[], torch.Tensor],
    target: Callable[[], torch.Tensor],
) -> torch.Tensor | None:
    """What the op returns first; None: the call must go through api.py's checks and the dispatcher.

    checked: whether it went through the checks, so that what is found out about the arguments may be kept. seed: gives
    the seed, always the same. target: checks base, and gives the tensor to write if inplace.
    """
    try:
        # Numbers of other classes, and a zero that may be negative, are not worth a key.
        if scaling.__class__ not in _NUMBERS or not 0 < abs(scaling) < math.inf or groups.__class__ is not int:
            return None
        if dropout_p.__class__ not in _NUMBERS or not 0 <= dropout_p < 1:
            return None
        like = _any_seed(x.device) if dropout_p > 0 else None
        tensors = x, lora_a, lora_b, a_index, b_index, base, like
        direct = served("routed_lora", backend, tensors, checked)
        if direct is None:
            return None
        if x.is_cpu and _checks.values_at_hand(x):
            if not checked:
                return None
            _checks.check_index_values("a_index", a_index, lora_a.shape[0])
            _checks.check_index_values("b_index", b_index, lora_b.shape[0])
        options = float(scaling), groups, tuple(offsets), float(dropout_p)
        plan = direct.find(inplace, *tensors, *options, passes)
        if plan is None and checked:
            plan = direct.make(inplace, *tensors, *options, passes)
        if plan is None:
            return None
        _node.serve(direct, _node.LORA, backend, x, lora_a)
        written = target() if inplace else base
        drawn = seed() if dropout_p > 0 else None
        if torch.is_grad_enabled() and (
            x.requires_grad
            or lora_a.requires_grad
            or lora_b.requires_grad
            or (written is not None and written.requires_grad)
        ):
            if below_autograd():
                return None
            out: torch.Tensor = _apply(
                plan, (direct, inplace, passes, *options, backend), x, lora_a, lora_b, a_index, b_index, written, drawn
            )
            return out
        tensors = x, lora_a, lora_b, a_index, b_index, written, drawn
        return _run(plan, inplace, passes, tensors, (*options, backend))[0]
    except (AttributeError, TypeError, RuntimeError):
        # Not a tensor, or sizes that a plan with checks of its own refuses: api.py has the words for it.
        if checked:
            raise
        return None


@functools.cache
def _any_seed(device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def _run(
    plan: Any, inplace: bool, passes: int, tensors: tuple[Any, ...], options: tuple[Any, ...]
) -> tuple[torch.Tensor, ...]:
    """(out, t) by the plan or, where it does not fit the addresses, by the op."""
    if not inplace:
        made: tuple[torch.Tensor, ...] | None = plan(*tensors)
        return _op_by_pass(*tensors, *options, passes) if made is None else made
    x, base = tensors[0], tensors[5]
    rows = base if base.shape[:-1] == x.shape[:-1] else base.view(*x.shape[:2], base.shape[-1])
    made = plan(*tensors[:5], rows, tensors[6])
    if made is None:
        return base, dispatched(routed_lora_inplace_op, fold_passes(x, passes), *tensors[1:], *options)
    if not base.is_inference():
        # A kernel's write is not seen by autograd: whoever saved base's old value must find out.
        torch.autograd.graph.increment_version(base)
    return base, made[0]


class DirectRoutedLoRA(torch.autograd.Function):
    """The op's derivative on a plan, in place or not; it saves the same tensors.

    how: direct, inplace, passes, scaling, groups, offsets, dropout_p, backend.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Any,
        how: tuple[Any, ...],
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        a_index: torch.Tensor | None,
        b_index: torch.Tensor | None,
        base: torch.Tensor | None,
        seed: torch.Tensor | None,
    ) -> torch.Tensor:
        out, t = _run(plan, how[1], how[2], (x, lora_a, lora_b, a_index, b_index, base, seed), how[3:])
        if how[1]:
            ctx.mark_dirty(base)
        ctx.save_for_backward(x, t, lora_a, lora_b, a_index, b_index, seed)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 9
        _, _, need_x, need_a, need_b, _, _, need_base, _ = ctx.needs_input_grad
        direct, _, passes, *options = ctx.how
        backward = functools.partial(_backward, direct.backward if may_be_direct() else None, passes, options[-1])
        grads = OPS.gradients(grad_out, ctx.saved_tensors, (need_x, need_a, need_b), options, backward)
        return None, None, *grads, None, None, grad_out if need_base else None, None


def _backward(direct: Any, passes: int, backend: str, *arguments: Any) -> tuple[torch.Tensor, ...] | None:
    made: tuple[torch.Tensor, ...] | None = None if direct is None else direct(*arguments, passes)
    return _backward_op_by_pass(*arguments, backend, passes) if made is None and passes else made


_op_by_pass = by_pass(functools.partial(dispatched, routed_lora_op), 0, 5)
_backward_op_by_pass = by_pass(routed_lora_backward_op, 0, 1, 2)
_apply = applied(DirectRoutedLoRA)
