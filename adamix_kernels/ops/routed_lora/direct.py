"""Calls of routed LoRA past the dispatcher (ops/_routed_direct.py, ops/_lora_direct.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _node
from .._lora_direct import Taken, call_lora
from .._routed_direct import RoutedDirect
from .op import OPS

_DIRECT = RoutedDirect(OPS, _node.LORA)


def call(
    tensors: tuple[Any, ...],
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
    """See RoutedDirect.call and call_lora."""

    def run(tensors: tuple[Any, ...], options: tuple[Any, ...], taken: Taken) -> torch.Tensor | None:
        return _DIRECT.call(tensors, options, backend, passes, checked, inplace, taken)

    return call_lora(run, tensors, scaling, groups, offsets, dropout_p, inplace, checked, seed, target)
