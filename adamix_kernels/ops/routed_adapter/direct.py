"""Calls of the routed adapter past the dispatcher (ops/_routed_direct.py)."""

from __future__ import annotations

from typing import Any

import torch

from .. import _node
from .._routed_direct import RoutedDirect
from .op import OPS

_DIRECT = RoutedDirect(OPS, _node.ADAPTER)


def call(
    tensors: tuple[Any, ...], add_input: bool, activation: str | None, backend: str, passes: int, checked: bool
) -> torch.Tensor | None:
    """See RoutedDirect.call. tensors: x to residual."""
    try:
        if activation == "":
            return None
        return _DIRECT.call(tensors, (add_input, "" if activation is None else activation), backend, passes, checked)
    except (AttributeError, TypeError, RuntimeError):
        # Not a tensor, or sizes that a plan with checks of its own refuses: api.py has the words for it.
        if checked:
            raise
        return None
