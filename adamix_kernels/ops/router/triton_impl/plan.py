"""Tiles of the router: one size of rows serves every GPU, so that a token alone and a batch are one compiled kernel."""

from __future__ import annotations

import torch

# Two programs of four warps a multiprocessor of an H100 at 8,192 rows.
ROWS = 32
# Bytes of shared memory that every GPU gives a program.
_SHARED = 99 << 10


def padded(experts: int) -> int:
    """Columns of a tile of logits."""
    return max(16, 1 << (experts - 1).bit_length())


def features_at_once(experts: int, dtype: torch.dtype) -> int:
    """Features a step."""
    return max(16, min(128, 8192 // padded(experts) * 2 // dtype.itemsize))


def stages(experts: int, dtype: torch.dtype, weight: torch.dtype) -> int:
    """Steps, of which all but one are in flight."""
    step = features_at_once(experts, dtype) * (ROWS * dtype.itemsize + padded(experts) * weight.itemsize)
    return 4 if dtype.itemsize == 2 and 3 * step <= _SHARED else 3
