"""What calls of LoRA past the dispatcher have in common, routed and gated.

Which seed is drawn decides nothing about a plan: one that is looked up with stands for all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

_NUMBERS = (int, float)
Taken = Callable[[], tuple[Any, ...]]


def call_lora(
    call: Callable[[tuple[Any, ...], tuple[Any, ...], Taken], torch.Tensor | None],
    tensors: tuple[Any, ...],
    scaling: float,
    groups: int,
    offsets: Sequence[int],
    dropout_p: float,
    inplace: bool,
    checked: bool,
    seed: Callable[[], torch.Tensor],
    target: Callable[[], torch.Tensor],
) -> torch.Tensor | None:
    """call(tensors to look up with, options, what gives those to compute with); None where api.py must go on.

    tensors: x to base. seed: gives the seed, always the same. target: checks base, and gives the tensor to write if
    inplace.
    """
    try:
        # Numbers of other classes, and a zero that may be negative, are not worth a key.
        if scaling.__class__ not in _NUMBERS or not 0 < abs(scaling) < math.inf or groups.__class__ is not int:
            return None
        if dropout_p.__class__ not in _NUMBERS or not 0 <= dropout_p < 1:
            return None
        like = _any_seed(tensors[0].device) if dropout_p > 0 else None
        options = float(scaling), groups, tuple(offsets), float(dropout_p)

        def taken() -> tuple[Any, ...]:
            written = target() if inplace else tensors[-1]
            return *tensors[:-1], written, seed() if dropout_p > 0 else None

        return call((*tensors, like), options, taken)
    except (AttributeError, TypeError, RuntimeError):
        # Not a tensor, or sizes that a plan with checks of its own refuses: api.py has the words for it.
        if checked:
            raise
        return None


@functools.cache
def _any_seed(device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device=device)
