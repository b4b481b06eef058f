"""Calls of a routed op past the dispatcher (ops/_direct.py).

A backend that serves them has an object `direct` in its module:

    find(*arguments)       a plan for the op's arguments, of a call that `make` was given before, or None
    make(*arguments)       the same for arguments that api.py has checked; None where the call cannot be planned
    backward(*arguments)   the backward op's result for the backward op's arguments, or None

Before LoRA's arguments stands whether the call is in place. Instead of the backend the last argument is `passes`: 0, or
the number of runs of whole samples that the indices [passes] are of (ops/_passes.py); all results but what is saved are
as without. A plan takes the tensors among the arguments, and gives (out, kept), in place (kept,); or None: not for
these addresses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import _checks, _node
from ._direct import below_autograd, may_be_direct, served, served_within
from ._direct_function import apply
from ._library import below_autograd as dispatched
from ._library import wrote
from ._passes import by_pass, fold_passes
from ._routed_ops import LORA, RoutedOps


class RoutedDirect:
    """The direct calls of one op; node: its number in _node."""

    def __init__(self, ops: RoutedOps, node: int):
        self.ops, self.node = ops, node
        fields = ops.arguments._fields
        self.added = fields.index(ops.layer.added)
        self.learned = range(len(ops.learned))
        # Of LoRA's backward.
        self.groups = ops.groups_of_backward
        self.saved = [fields.index(name) if name in fields else None for name in ops.saved]
        self._op_by_pass = by_pass(functools.partial(dispatched, ops.forward), 0, self.added)
        self.backward_by_pass = by_pass(ops.backward, 0, 1, 2)
        _node.BACKWARD[node] = self.planned_backward

    def call(
        self,
        tensors: tuple[Any, ...],
        options: tuple[Any, ...],
        backend: str,
        passes: int,
        checked: bool,
        inplace: bool = False,
        taken: Callable[[], tuple[Any, ...]] | None = None,
    ) -> torch.Tensor | None:
        """What the op returns first; None: the call must go through api.py's checks and the dispatcher.

        checked: whether it went through the checks, so that what is found out about the arguments may be kept. taken:
        gives the tensors to compute with, where they are not those to look up with.
        """
        found = served_within(self.ops.name, backend, tensors, checked, options[1] if self.ops.layer is LORA else 1)
        if found is None:
            return None
        direct, most = found
        x = tensors[0]
        if x.is_cpu and _checks.values_at_hand(x):
            if not checked:
                return None
            self.ops.check_values(self.ops.arguments(*tensors, *options))
        arguments = (*tensors, *options, passes)
        if self.ops.layer is LORA:
            arguments = (inplace, *arguments)
        plan = direct.find(*arguments)
        if plan is None and checked:
            plan = direct.make(*arguments)
        if plan is None:
            return None
        _node.serve(direct, self.node, backend, x, tensors[1], most)
        _node.keep(_node.IN_PLACE if inplace else _node.FORWARDS[self.node], plan, tensors, (*options, passes))
        tensors = tensors if taken is None else taken()
        how = direct, inplace, passes, *options, backend
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            if below_autograd():
                return None
            out: torch.Tensor = apply(self, plan, how, *tensors)
            return out
        return self.run(plan, how, tensors)[0]

    def planned_backward(self, kind: int, passes: int, backend: str, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """The backward of a node in C++ that has no plan for it, or that something watches."""
        count = len(self.saved) + 1
        tensors = arguments[:count]
        groups = 1 if self.groups is None else arguments[self.groups]
        direct = served(self.ops.name, backend, (tensors[1], tensors[3]), False, groups) if may_be_direct() else None
        made = _backward(self, direct, passes, backend, *arguments)
        # None to be kept of other kernels, which "auto" may have chosen since the forward.
        find = getattr(getattr(direct, "backward", None), "find", None)
        if made is not None and find is not None:
            _node.keep(kind, find(*arguments, passes), tensors, (*arguments[count:], passes))
        return self.ops.backward(*arguments, backend) if made is None else made

    def run(self, plan: Any, how: tuple[Any, ...], tensors: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """(out, kept) by the plan or, where it does not fit the addresses, by the op."""
        _, inplace, passes, *options = how
        if not inplace:
            made: tuple[torch.Tensor, ...] | None = plan(*tensors)
            return self._op_by_pass(*tensors, *options, passes) if made is None else made
        x, base = tensors[0], tensors[self.added]
        rows = base if base.shape[:-1] == x.shape[:-1] else base.view(*x.shape[:2], base.shape[-1])
        made = plan(*tensors[: self.added], rows, *tensors[self.added + 1 :])
        if made is None:
            return base, dispatched(self.ops.inplace, fold_passes(x, passes), *tensors[1:], *options)
        wrote(base)
        return base, made[0]

    def backward(self, how: tuple[Any, ...]) -> tuple[Callable[..., tuple[torch.Tensor, ...] | None], list[Any]]:
        """See _direct_function.Calls; how: direct, inplace, passes, the op's options, backend."""
        direct, _, passes, *options = how
        asked = direct if may_be_direct() else None
        return functools.partial(_backward, self, asked, passes, options[-1]), options


def _backward(
    routed: RoutedDirect, direct: Any, passes: int, backend: str, *arguments: Any
) -> tuple[torch.Tensor, ...] | None:
    made: tuple[torch.Tensor, ...] | None = None if direct is None else direct.backward(*arguments, passes)
    return routed.backward_by_pass(*arguments, backend, passes) if made is None and passes else made
