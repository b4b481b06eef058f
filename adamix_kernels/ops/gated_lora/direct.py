"""Calls of gated LoRA past the dispatcher (ops/_gated_direct.py).

Which seed is drawn decides nothing about a plan: one that is looked up with stands for all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._gated_direct import GatedDirect
from .op import OPS

_DIRECT = GatedDirect(OPS)
_NUMBERS = (int, float)


def call(
    tensors: tuple[Any, ...],
    scaling: float,
    groups: int,
    offsets: Sequence[int],
    dropout_p: float,
    mix: str,
    backend: str,
    inplace: bool,
    checked: bool,
    seed: Callable[[], torch.Tensor],
    target: Callable[[], torch.Tensor],
) -> torch.Tensor | None:
    """See GatedDirect.call. tensors: x to base. seed: gives the seed, always the same. target: checks base, and gives
    the tensor to write if inplace.
    """
    try:
        # Numbers of other classes, and a zero that may be negative, are not worth a key.
        if scaling.__class__ not in _NUMBERS or not 0 < abs(scaling) < math.inf or groups.__class__ is not int:
            return None
        if dropout_p.__class__ not in _NUMBERS or not 0 <= dropout_p < 1 or inplace.__class__ is not bool:
            return None
        if not (checked or _DIRECT.as_given(tensors)):
            return None
        like = _any_seed(tensors[0].device) if dropout_p > 0 else None
        options = float(scaling), groups, tuple(offsets), float(dropout_p), mix

        def taken() -> tuple[Any, ...]:
            written = target() if inplace else tensors[-1]
            return *tensors[:-1], written, seed() if dropout_p > 0 else None

        return _DIRECT.call((*tensors, like), options, backend, checked, inplace, taken)
    except (AttributeError, TypeError, RuntimeError):
        # Not a tensor, or sizes that a plan with checks of its own refuses: api.py has the words for it.
        if checked:
            raise
        return None


@functools.cache
def _any_seed(device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device=device)
