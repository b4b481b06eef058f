"""What a backend's kernels take of a call at most, where the reference takes any: shapes alone, no tensor's values."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch


class Extent(NamedTuple):
    """What a call asks of kernels at once, or the most that they take.

    columns: narrow columns that a tile of rows holds of one expert: r, of LoRA groups * r, in units of 16 for every
    group. groups: LoRA's. experts: of a bank to be merged, those with scores of float64 counted twice.
    """

    columns: int = 0
    groups: int = 0
    experts: int = 0

    def exceeds(self, most: Extent) -> bool:
        return self.columns > most.columns or self.groups > most.groups or self.experts > most.experts


UNLIMITED = Extent(sys.maxsize, sys.maxsize, sys.maxsize)


def tile_columns(columns: int, groups: int) -> int:
    """groups * r columns as a tile has them: every group's from a multiple of 16 on."""
    unit = 16 * max(groups, 1)
    return -(-columns // unit) * unit


def routed_extent(columns: int, groups: int = 1) -> Extent:
    """Of a call of a layer with two banks; columns: groups * r."""
    return Extent(tile_columns(columns, groups), groups)


def refusal(request: str, device: torch.device, dtype: torch.dtype, extent: Extent, most: Extent) -> str:
    """What is too large for an explicit backend, how large it may be there, and what to do, in words."""
    hints = "backend='auto' and 'reference' take any"
    if extent.groups > most.groups:
        what, got, limit = "groups", extent.groups, most.groups
    elif extent.experts > most.experts:
        what, got, limit = "bank: M, twice with float64 scores", extent.experts, most.experts
    else:
        what, got, limit = "r, in units of 16", extent.columns, most.columns
        if extent.groups > 1:
            what = "groups * r, in units of 16 for every group"
        hints += "; a smaller rank needs less"
        hints += ", 16 bits half as much" if request == "cuda" and dtype.itemsize > 2 else ""
    return f"{what}: got {got}, expected at most {limit} on {str(device)!r} in {dtype} ({hints})"
