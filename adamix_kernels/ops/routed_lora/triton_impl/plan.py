"""How a call is cut into programs: decided by shapes alone, values stay on the device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ...._triton_utils import INTERPRETING, capability, dot_dtype, precision
from ..._routed_plan import MAX_WIDTH, Plan, group_rows, make_plan, power_of_2
from .tables import MAX_REGISTERS, config

# Row numbers are 32-bit with a tile to spare, addresses 64-bit.
MAX_ROWS = 2**31 - 256
# Widest rank a program holds at once; wider factors go in chunks.
MAX_RANK = 128
# A call of few rows is cut into lower tiles until about this many programs run, two on a multiprocessor; a wide narrow
# tile, whose weights every tile reads, into half as many.
MIN_PROGRAMS, WIDE = 256, 64
# Where even the lowest tiles leave multiprocessors without a program, a tile's columns are split among programs.
MULTIPROCESSORS = 132
# Programs on a multiprocessor that this counts on in 16 bits, narrow tiles up to this width; wider and float32: one.
RESIDENT, RESIDENT_WIDTH = 2, 64
# One expert's 33 to 64 columns are read half as often by tiles of TALL rows in the forward, where rows in a row that
# tiles do not cross are at least TALL_SPAN. From 9.0 on, but for 12.x, a multiprocessor has shared memory for two.
TALL, TALL_SPAN = 64, 256


def narrow_columns(plan: Plan) -> tuple[int, int]:
    """(columns of one expert that a program holds at once, the class of its narrow tile in the tables)."""
    rp = min(plan.rp, MAX_RANK)
    # What goes in chunks needs as much shared memory as all experts of a tile.
    return rp, min(plan.rp * max(plan.down.padded, plan.up.padded), MAX_WIDTH)


def row_blocks(rows: int) -> list[int]:
    """The heights of tile that `rows` of the table stands for: itself, then for calls of fewer rows."""
    return [rows, *(height for height in (64, 32, 16) if height < rows)]


def may_be_tall(kernel: str, capability: int, itemsize: int, width: int, masked: bool) -> bool:
    """Whether tiles of TALL rows are compiled, too; width, masked: of the narrow tile."""
    wide = itemsize == 2 and width == RESIDENT_WIDTH and not masked
    return kernel == "lora_forward_kernel" and wide and 90 <= capability < 120


def gaps(offsets: list[int], per_group: int, width: int) -> tuple[tuple[int, int], ...]:
    """(start, length) of the output columns that no group covers."""
    edges = [*sorted(offsets), width]
    ends = [0, *(offset + per_group for offset in edges[:-1])]
    return tuple((end, start - end) for end, start in zip(ends, edges, strict=True) if start > end)


class Call(NamedTuple):
    """What every launch of one call needs. A is the plan's down side, B its up side.

    sizes: the constants of the model, the same for every batch. Of gates (ops/gated_lora): slots, of a row whose tile
    holds all experts, else 0; each: rows here for one row of x.
    """

    batch: int
    tokens: int
    plan: Plan
    sizes: dict[str, Any]
    dtype: torch.dtype
    capability: int
    slots: int = 0
    each: int = 1

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def packed(self) -> int:
        """groups * r."""
        return len(self.sizes["OFFSETS"]) * self.sizes["RANK"]

    def tiles(self, kernel: str, columns: int) -> tuple[dict[str, Any], tuple[int, int], tuple[Any, ...]]:
        """Constants, grid (row tiles, column splits) and the rows' order for a kernel that walks `columns` a tile."""
        plan = self.plan
        rp, width = narrow_columns(plan)
        chosen = config(kernel, self.capability, self.dtype.itemsize, width)
        heights = row_blocks(chosen.rows)
        masked = plan.down.masked or plan.up.masked or plan.key is not None or self.slots > 0
        if may_be_tall(kernel, self.capability, self.dtype.itemsize, width, masked) and plan.span >= TALL_SPAN:
            heights = [TALL, *heights]
        # Interpreted, a program costs more than its rows.
        enough = 1 if INTERPRETING else MIN_PROGRAMS // (2 if width >= WIDE else 1)
        rows = next((height for height in heights if self.rows >= enough * height), heights[-1])
        groups = group_rows(plan, rows)
        splits = max(1, min(-(-columns // chosen.cols), MULTIPROCESSORS // groups.tiles, 8))
        a, b = plan.down, plan.up
        meta = self.sizes | dict(
            RP=rp, CHUNKS=max(1, -(-self.packed // rp)),
            A_EXPERTS=a.experts, A_PADDED=a.padded, A_MASKED=a.masked,
            B_EXPERTS=b.experts, B_PADDED=b.padded, B_MASKED=b.masked,
            BLOCK_M=rows, **self.block(chosen),
        )  # fmt: skip
        return meta, (groups.tiles, splits), groups[:3]

    def block(self, chosen) -> dict[str, Any]:
        return dict(
            BLOCK_C=chosen.cols, STAGES=chosen.num_stages, DOT=dot_dtype(self.dtype), PRECISION=precision(self.dtype),
            num_warps=chosen.num_warps, num_stages=chosen.num_stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip

    def scalars(self, dropout_p: float, scaling: float) -> tuple[int | float, ...]:
        """What the tile kernels take after their tensors."""
        return self.plan.span, self.plan.down.div, self.plan.up.div, *dropout_constants(dropout_p), scaling


def make_call(batch: int, tokens: int, lora_a, lora_b, a_index, b_index, offsets, width: int) -> Call:
    """The banks, indices and offsets are the op's; width: the output's columns."""
    if batch * tokens > MAX_ROWS:
        raise ValueError(f"x: got {batch * tokens} rows, expected at most {MAX_ROWS} for the Triton kernels")
    groups, (_, packed, k), (_, per_group, rank) = len(offsets), lora_a.shape, lora_b.shape
    plan = make_plan(batch, tokens, packed, a_index, b_index, lora_a.shape[0], lora_b.shape[0])
    sizes = dict(K=k, RANK=rank, NG=per_group // groups, OFFSETS=tuple(offsets), WIDTH=width)
    return Call(batch, tokens, plan, sizes, lora_a.dtype, capability(lora_a.device))


def padded_rank(rank: int) -> int:
    """rank padded to a power of two: 16 at least, the tensor cores' edge, and MAX_RANK at most."""
    return min(max(16, power_of_2(rank)), MAX_RANK)


@functools.cache
def dropout_constants(dropout_p: float) -> tuple[int, float]:
    """The mask's bound as a signed 32-bit number (ops/_dropout.py), and 1 / (1 - p)."""
    return int(dropout_p * 2**32) - 2**31, 1.0 / (1.0 - dropout_p)
