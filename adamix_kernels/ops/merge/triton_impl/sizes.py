"""Block sizes of merging: all that is streamed is read once, so one size serves every GPU; not yet measured."""

from __future__ import annotations

import torch
import triton.language as tl

from ...._triton_utils import DTYPES

# Elements of the result a program; elements of the sum of planes in flight.
BLOCK, SUM_ROWS = 1024, 2048
# Launch plans of one list of banks that are kept, one for each set of addresses.
MAX_PLANS = 4
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


def lora_tile(factors: torch.dtype, experts: int = 1) -> tuple[int, int, int, int | None]:
    """Rows and columns of the weight a program, its warps, and the most registers, where two are to run at a time.

    Of float32 factors no more rows than a warp's products take without the transposed copy in shared memory that wgmma
    wants; of banks more, as every program makes the means that it reads.
    """
    if factors.itemsize != 2:
        return 32, 128, 4, None
    return (64, 128, 4, None) if experts == 1 else (128, 128, 8, 128)


def lora_ranks(rank: int) -> int:
    """Ranks a product."""
    return min(64, max(16, padded(rank)))
