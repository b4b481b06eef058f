"""Calls of the gated adapter past the dispatcher (ops/_gated_direct.py)."""

from __future__ import annotations

from typing import Any

import torch

from .._gated_direct import GatedDirect
from .op import OPS

_DIRECT = GatedDirect(OPS)


def call(
    tensors: tuple[Any, ...], add_input: bool, activation: str | None, mix: str, backend: str, checked: bool
) -> torch.Tensor | None:
    """See GatedDirect.call. tensors: x to residual."""
    try:
        if activation == "" or not (checked or _DIRECT.as_given(tensors)):
            return None
        return _DIRECT.call(tensors, (add_input, "" if activation is None else activation, mix), backend, checked)
    except (AttributeError, TypeError, RuntimeError):
        # Not a tensor, or sizes that a plan with checks of its own refuses: api.py has the words for it.
        if checked:
            raise
        return None
