"""Block sizes of merging: all that is streamed is read once, so one size serves every GPU; not yet measured."""

from __future__ import annotations

import torch
import triton.language as tl

from ...._triton_utils import DTYPES

# Elements of the result a program; weights a tile of LoRA's merge; elements of the sum of planes in flight.
BLOCK, LORA_TILE, SUM_ROWS = 1024, (32, 128), 2048
# Programs of the gradient, each with one row of partial sums.
MAX_PROGRAMS = 1024


def padded(count: int) -> int:
    return 1 << (count - 1).bit_length()


def unroll(experts: int) -> int:
    """Experts whose loads are in flight at once."""
    return min(padded(experts), 8)


def grad_block(experts: int) -> int:
    """Elements of the gradient a step: with all experts they are one tile in registers."""
    return max(16, 2048 // padded(experts))


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else DTYPES[dtype]
