"""Calls of the routed adapter past the dispatcher (ops/_direct.py).

A backend that serves them has an object `direct` in its module:

    find(*arguments)       a plan for the op's arguments, of a call that `make` was given before, or None
    make(*arguments)       the same for arguments that api.py has checked; None where the call cannot be planned
    backward(*arguments)   the backward op's result for the backward op's arguments, or None

Instead of the backend the last argument is `passes`: 0, or the number of runs of whole samples that the indices
[passes] are of (ops/_passes.py); all results but what is saved are as without. A plan takes the tensors among the
arguments, x to residual, and gives (out, pre), or None: not for these addresses.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import _checks, _node
from .._direct import applied, below_autograd, may_be_direct, served
from .._library import below_autograd as dispatched
from .._library import once_differentiable
from .._passes import by_pass
from .op import OPS, routed_adapter_backward_op, routed_adapter_op


def call(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    residual: torch.Tensor | None,
    add_input: bool,
    activation: str | None,
    backend: str,
    passes: int,
    checked: bool,
) -> torch.Tensor | None:
    """What the op returns first; None: the call must go through api.py's checks and the dispatcher.

    checked: whether it went through the checks, so that what is found out about the arguments may be kept.
    """
    tensors = x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual
    kind = "" if activation is None else activation
    try:
        direct = served("routed_adapter", backend, tensors, checked)
        if direct is None:
            return None
        if x.is_cpu and _checks.values_at_hand(x):
            if not checked:
                return None
            _checks.check_index_values("down_index", down_index, down_weight.shape[0])
            _checks.check_index_values("up_index", up_index, up_weight.shape[0])
        plan = direct.find(*tensors, add_input, kind, passes)
        if plan is None and checked:
            plan = direct.make(*tensors, add_input, kind, passes)
        if plan is None:
            return None
        _node.serve(direct, _node.ADAPTER, backend, x, down_weight)
        if torch.is_grad_enabled() and (
            x.requires_grad
            or down_weight.requires_grad
            or up_weight.requires_grad
            or any(t is not None and t.requires_grad for t in (down_bias, up_bias, residual))
        ):
            if below_autograd():
                return None
            out: torch.Tensor = _apply(plan, (direct, passes, add_input, kind, backend), *tensors)
            return out
        made = plan(*tensors)
        return None if made is None else made[0]
    except (AttributeError, TypeError, RuntimeError):
        # Not a tensor, or sizes that a plan with checks of its own refuses: api.py has the words for it.
        if checked:
            raise
        return None


class DirectRoutedAdapter(torch.autograd.Function):
    """The op's derivative on a plan; it saves the same. how: direct, passes, add_input, activation, backend."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Any,
        how: tuple[Any, ...],
        x: torch.Tensor,
        down_weight: torch.Tensor,
        down_bias: torch.Tensor | None,
        up_weight: torch.Tensor,
        up_bias: torch.Tensor | None,
        down_index: torch.Tensor | None,
        up_index: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        tensors = x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual
        made = plan(*tensors)
        if made is None:
            made = _op_by_pass(*tensors, *how[2:], how[1])
        out: torch.Tensor = made[0]
        ctx.save_for_backward(x, made[1], down_weight, up_weight, down_index, up_index)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 10
        _, _, need_x, need_wd, need_bd, need_wu, need_bu, _, _, need_residual = ctx.needs_input_grad
        direct, passes, *options = ctx.how
        backward = functools.partial(_backward, direct.backward if may_be_direct() else None, passes, options[-1])
        needs = need_x, need_wd, need_bd, need_wu, need_bu
        grads = OPS.gradients(grad_out, ctx.saved_tensors, needs, options, backward)
        return None, None, *grads, None, None, grad_out if need_residual else None


def _backward(direct: Any, passes: int, backend: str, *arguments: Any) -> tuple[torch.Tensor, ...] | None:
    made: tuple[torch.Tensor, ...] | None = None if direct is None else direct(*arguments, passes)
    return _backward_op_by_pass(*arguments, backend, passes) if made is None and passes else made


_op_by_pass = by_pass(functools.partial(dispatched, routed_adapter_op), 0, 7)
_backward_op_by_pass = by_pass(routed_adapter_backward_op, 0, 1, 2)
_apply = applied(DirectRoutedAdapter)
