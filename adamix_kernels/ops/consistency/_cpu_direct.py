"""The reference's direct calls (direct.py): eager losses with a gradient on a CPU that were checked before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._direct import Kept, traits
from . import _cpu
from .signatures import AdaMix, Consistency

_DENSE = torch.contiguous_format
_Plan = Callable[..., tuple[Any, ...]]


class _Plans:
    """Plans by all that decides them: traits of the first `count` arguments, and the others."""

    def __init__(self, count: int, plan: Callable[..., _Plan | None]):
        self._count, self._plan = count, plan
        self._plans: Kept[_Plan | None] = Kept()

    def find(self, *arguments: Any) -> _Plan | None:
        return self._plans.get(self._key(arguments))

    def make(self, *arguments: Any) -> _Plan | None:
        key = self._key(arguments)
        if key in self._plans:
            return self._plans[key]
        return self._plans.keep(key, self._plan(*arguments) if arguments[0].is_cpu else None)

    def _key(self, arguments: tuple[Any, ...]) -> Any:
        return arguments[self._count :], *map(traits, arguments[: self._count])


def _adamix(*arguments: Any) -> _Plan | None:
    *tensors, ahead, weight, ignore_index, label_smoothing, detach_target, expected = arguments
    if not ahead or tensors[3] is not None:
        return None
    options = weight, ignore_index, label_smoothing, detach_target

    def plan(
        logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, _num_items: None
    ) -> tuple[Any, ...]:
        with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
            d_logits = torch.empty_like(logits, memory_format=_DENSE)
            *losses, scales = _cpu.adamix(AdaMix(logits, labels, mask, None, *options), expected, d_logits)
            return *losses, None, scales, d_logits

    return plan


def _consistency(*arguments: Any) -> _Plan | None:
    *_, need_a, need_b, detach_target, reduction, expected = arguments
    if not (need_a or need_b):
        return None

    def plan(logits_a: torch.Tensor, logits_b: torch.Tensor, mask: torch.Tensor | None) -> tuple[Any, ...]:
        with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
            da = torch.empty_like(logits_a, memory_format=_DENSE) if need_a else None
            db = torch.empty_like(logits_b, memory_format=_DENSE) if need_b else None
            a = Consistency(logits_a, logits_b, mask, detach_target, reduction)
            loss, scale = _cpu.consistency(a, expected, (da, db))
            return loss, None, scale, *(g for g in (da, db) if g is not None)

    return plan


class Direct:
    """The attribute `direct` of the reference."""

    def __init__(self, writes_gradient: Callable[[str, torch.dtype, float | None], bool]):
        self.writes_gradient = writes_gradient
        self.adamix, self.consistency = _Plans(4, _adamix), _Plans(3, _consistency)

    def adamix_backward(self, grad: torch.Tensor, *rest: Any) -> tuple[()] | None:
        return _there_already(grad, rest[-1])

    def consistency_backward(self, grad: torch.Tensor, *rest: Any) -> tuple[()] | None:
        return _there_already(grad, rest[-1])


def _there_already(grad: torch.Tensor, written: float | None) -> tuple[()] | None:
    """Nothing to do where the gradient was written for this incoming one; None elsewhere."""
    at_hand = grad.is_cpu and written is not None
    return () if at_hand and grad.item() == _cpu.as_stored(written, grad.dtype) else None  # type: ignore[arg-type]
