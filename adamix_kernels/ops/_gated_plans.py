"""Plans of direct calls of a gated op on Triton kernels (ops/_triton_plans.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._routed_plan import same_ids
from ._triton_plans import Plan, Planned


class PlannedGated:
    """Direct calls of a backend's forward and backward, those that sort nothing on the device.

    tensors: how many the forward takes, and the backward; indices: where in each the two indices stand. A plan tells
    tensors apart by their memory, so that one index of both sides is given it once.
    """

    def __init__(
        self,
        forward: Callable[..., Sequence[torch.Tensor]],
        backward: Callable[..., Sequence[torch.Tensor]],
        tensors: tuple[int, int],
        indices: tuple[int, int],
        in_place: Callable[..., Sequence[torch.Tensor]] | None = None,
    ):
        self._at, self._at_backward = indices
        self._forward = Planned(_of_two(forward, self._at), tensors[0])
        self._in_place = None if in_place is None else Planned(_of_two(in_place, self._at), tensors[0])
        self._backward, self._count = Planned(_of_two(backward, self._at_backward), tensors[1]), tensors[0]

    def find(self, inplace: bool, *arguments: Any) -> Plan | None:
        return self._of(inplace).find(*_once(arguments, self._at))

    def make(self, inplace: bool, *arguments: Any) -> Callable[..., Any] | None:
        return self._of(inplace).make(*_once(arguments, self._at))

    def backward(self, *arguments: Any) -> tuple[torch.Tensor, ...] | None:
        return self._backward(*_once(arguments, self._at_backward))

    def _of(self, inplace: bool) -> Planned:
        chosen = self._in_place if inplace else self._forward
        assert chosen is not None
        return chosen


def _once(arguments: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    """The arguments and whether one index serves both sides, in whose place on the second then stands None."""
    first, second = arguments[at : at + 2]
    if first is None or not same_ids(first, second):
        return *arguments, False
    return *arguments[: at + 1], None, *arguments[at + 2 :], True


def _of_two(run: Callable[..., Sequence[torch.Tensor]], at: int) -> Callable[..., Sequence[torch.Tensor]]:
    """`run` of arguments as _once gives them."""

    def of_one(*arguments: Any) -> Sequence[torch.Tensor]:
        *given, same = arguments
        if same:
            given[at + 1] = given[at]
        return run(*given)

    return of_one
