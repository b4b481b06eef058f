"""One call that verifies an op, and what its integers are drawn by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """leaves: shapes of the floating arguments, None for one that is left out, all differentiated by; the names in
    `placed` say how they lie in memory. extra: made by a generator, on the CPU. call(backend, leaves, extra) -> the
    tensor to differentiate, or a sequence that starts with it.

    scale: of the first leaf's values; of the others 1 / sqrt(last axis), so that results are of its size.
    """

    name: str
    leaves: tuple[tuple[int, ...] | None, ...]
    call: Callable[[str, Sequence[Any], Sequence[Any]], Any]
    extra: Callable[[torch.Generator], tuple[Any, ...]] = lambda generator: ()
    placed: str = ""
    scale: float = 1.0
    # Only where a GPU runs it: too much for an interpreter.
    large: bool = False


def ids(*given: list[Any] | tuple[int, ...] | None) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """For each side a list of ids, (experts, *shape) to be drawn, whose last expert nobody uses, or None."""

    def extra(generator: torch.Generator) -> tuple[Any, ...]:
        made: list[Any] = []
        for one in given:
            if isinstance(one, tuple):
                made.append(torch.randint(max(1, one[0] - 1), one[1:], generator=generator))
            else:
                made.append(None if one is None else torch.tensor(one))
        return tuple(made)

    return extra


def with_seed(ids: Callable[[torch.Generator], tuple[Any, ...]]) -> Callable[[torch.Generator], tuple[Any, ...]]:
    return lambda generator: (*ids(generator), torch.tensor(20_240_229))


def rounded(t: torch.Tensor) -> torch.Tensor:
    """To integers, with the gradient of no rounding."""
    return t + (t.round() - t).detach()


def enlarged(weight: torch.Tensor) -> torch.Tensor:
    """A weight [..., H], or a bias, of logits as integers that are not all 0. By the power of two from sqrt(H) on: no
    product is rounded before it is made an integer, whatever the dtype."""
    return rounded(weight * 2.0 ** math.ceil(math.log2(weight.shape[-1]) / 2))
