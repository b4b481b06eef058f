"""Calls of gated LoRA past the dispatcher (ops/_gated_direct.py, ops/_lora_direct.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._gated_direct import GatedDirect
from .._lora_direct import Taken, call_lora
from .op import OPS

_DIRECT = GatedDirect(OPS)


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
    """See GatedDirect.call and call_lora."""

    def run(tensors: tuple[Any, ...], options: tuple[Any, ...], taken: Taken) -> torch.Tensor | None:
        if inplace.__class__ is not bool or not (checked or _DIRECT.as_given(tensors)):
            return None
        return _DIRECT.call(tensors, (*options, mix), backend, checked, inplace, taken)

    return call_lora(run, tensors, scaling, groups, offsets, dropout_p, inplace, checked, seed, target)
