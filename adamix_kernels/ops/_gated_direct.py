"""Calls of a gated op past the dispatcher (ops/_direct.py), as ops/_routed_direct.py has them: without passes, and with
a node in Python.

A backend that serves them has an object `direct` in its module, with find(inplace, *arguments), make(inplace,
*arguments) and backward(*arguments), arguments those of the op without the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _checks
from ._direct import below_autograd, may_be_direct, served
from ._direct_function import apply
from ._library import below_autograd as dispatched
from ._library import wrote
from ._routed_ops import LORA, RoutedOps


class GatedDirect:
    """The direct calls of one op."""

    def __init__(self, ops: RoutedOps):
        fields = ops.arguments._fields
        self.ops, self.added = ops, fields.index(ops.layer.added)
        self.banks = [fields.index(name) for name in ops.layer.banks]
        self.indices = [fields.index(name) for name in ops.layer.indices]
        self.learned = [fields.index(name) for name in ops.learned]
        self.saved = [fields.index(name) if name in fields else None for name in ops.saved]

    def as_given(self, tensors: tuple[Any, ...]) -> bool:
        """Whether the op takes these arguments of its public function as they are: a bank of one has no index."""
        pairs = zip(self.banks, self.indices, strict=True)
        return all(tensors[index] is None or tensors[bank].shape[:1] > (1,) for bank, index in pairs)

    def call(
        self,
        tensors: tuple[Any, ...],
        options: tuple[Any, ...],
        backend: str,
        checked: bool,
        inplace: bool = False,
        taken: Callable[[], tuple[Any, ...]] | None = None,
    ) -> torch.Tensor | None:
        """What the op returns first; None: the call must go through api.py's checks and the dispatcher.

        checked: whether it went through the checks, so that what is found out about the arguments may be kept. taken:
        gives the tensors to compute with, where they are not those to look up with.
        """
        direct = self._serving(tensors, backend, checked, options[1] if self.ops.layer is LORA else 1)
        if direct is None:
            return None
        if tensors[0].is_cpu and _checks.values_at_hand(tensors[0]):
            if not checked:
                return None
            self.ops.check_values(self.ops.arguments(*tensors, *options))
        plan = direct.find(inplace, *tensors, *options)
        if plan is None and checked:
            plan = direct.make(inplace, *tensors, *options)
        if plan is None:
            return None
        tensors = tensors if taken is None else taken()
        how = direct, inplace, *options, backend
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            if below_autograd():
                return None
            out: torch.Tensor = apply(self, plan, how, *tensors)
            return out
        return self.run(plan, how, tensors)[0]

    def _serving(self, tensors: tuple[Any, ...], backend: str, checked: bool, groups: int) -> Any:
        """As _direct.served; the class of shapes goes by the narrow columns of all experts of the larger bank."""
        down, up = (tensors[n] for n in self.banks)
        if down.dim() != 3 or up.dim() != 3:
            return None
        size = max(down.shape[0], up.shape[0]) * down.shape[1]
        return served(self.ops.name, backend, tensors, checked, groups, size)

    def run(self, plan: Any, how: tuple[Any, ...], tensors: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """(out, kept) by the plan or, where it does not fit the addresses, by the op."""
        _, inplace, *options = how
        if not inplace:
            made: tuple[torch.Tensor, ...] | None = plan(*tensors)
            return dispatched(self.ops.forward, *tensors, *options) if made is None else made
        x, base = tensors[0], tensors[self.added]
        rows = base if base.shape[:-1] == x.shape[:-1] else base.view(*x.shape[:2], base.shape[-1])
        made = plan(*tensors[: self.added], rows, *tensors[self.added + 1 :])
        if made is None:
            return base, dispatched(self.ops.inplace, *tensors, *options)
        wrote(base)
        return base, made[0]

    def backward(self, how: tuple[Any, ...]) -> tuple[Callable[..., tuple[torch.Tensor, ...] | None] | None, list[Any]]:
        """See _direct_function.Calls; how: direct, inplace, the op's options, backend."""
        direct, _, *options = how
        return direct.backward if may_be_direct() else None, options
