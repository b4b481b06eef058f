"""How a call is cut into programs: decided by shapes alone, values stay on the device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ...._triton_utils import INTERPRETING, capability, dot_dtype, precision
from .tables import config, register_limit

# Row numbers are 32-bit with a tile to spare, addresses 64-bit.
MAX_ROWS = 2**31 - 128
# Widest rank a program holds at once; wider factors go in chunks.
MAX_RANK = 128
# Narrow columns of all experts that one tile may hold; beyond, the rows are grouped by expert.
MAX_WIDTH = 256
# Fewer tokens a sample than this and a tile meets several samples.
MIN_SPAN = 16
# Fewest rows for which a sort by expert pays.
MIN_SORTED = 64
# Programs that fill a GPU a few times over, row tiles that make a split worth its plane, and most planes.
PROGRAMS, MIN_TILES, MAX_SPLITS = 512, 4, 64
# A call of few rows is cut into smaller tiles, then its columns among programs, until about this many run.
MIN_PROGRAMS = 264
# Programs on a multiprocessor that this counts on in 16 bits (MIN_PROGRAMS are two on each of 132); float32, and a tile
# of MAX_WIDTH narrow columns: one.
RESIDENT = 2
# Elements that a program of the sum of the planes takes.
SUM_BLOCK = 1024


def padded_rank(rank: int) -> int:
    """rank padded to a power of two: 16 at least, the tensor cores' edge, and MAX_RANK at most."""
    return min(max(16, 1 << (rank - 1).bit_length()), MAX_RANK)


def row_blocks(rows: int) -> list[int]:
    """The heights of tile that `rows` of the table stands for: itself, then for calls of fewer rows."""
    return [rows, *(height for height in (64, 32, 16) if height < rows)]


def gaps(offsets: list[int], per_group: int, width: int) -> tuple[tuple[int, int], ...]:
    """(start, length) of the output columns that no group covers."""
    edges = [*sorted(offsets), width]
    ends = [0, *(offset + per_group for offset in edges[:-1])]
    return tuple((end, start - end) for end, start in zip(ends, edges, strict=True) if start > end)


class Plan(NamedTuple):
    """What every launch of one call needs; sizes: the constants of the model, the same for every batch."""

    num_rows: int
    a_index: torch.Tensor | None
    b_index: torch.Tensor | None
    a_divisor: int
    b_divisor: int
    perm: torch.Tensor | None
    a_wide: int
    b_wide: int
    sizes: dict[str, Any]
    rank: int
    dtype: torch.dtype
    capability: int

    def scalars(self, dropout_p: float, scaling: float) -> tuple[int | float, ...]:
        """What every kernel takes after its tensors."""
        return self.num_rows, self.a_divisor, self.b_divisor, *dropout_constants(dropout_p), scaling

    def tiles(self, kernel: str, wide: int, columns: int) -> tuple[dict[str, Any], tuple[int, int]]:
        """Block sizes and grid (row tiles, column splits) of a kernel that walks `columns` for a tile of rows."""
        width = self.rank * max(wide, 1)
        chosen = config(kernel, self.capability, self.dtype.itemsize, width)
        heights = row_blocks(chosen.rows)
        # Interpreted, a program costs more than its rows.
        enough = 1 if INTERPRETING else MIN_PROGRAMS
        rows = next((height for height in heights if self.num_rows >= enough * height), heights[-1])
        tiles = -(-self.num_rows // rows)
        splits = max(1, min(-(-columns // chosen.cols), MIN_PROGRAMS // max(tiles, 1), 8))
        packed = len(self.sizes["OFFSETS"]) * self.sizes["RANK"]
        chunks = max(1, -(-packed // self.rank))
        meta = self._meta(chosen, rows, width) | dict(WIDE=wide, BLOCK_R=self.rank, CHUNKS=chunks)
        return meta, (tiles, splits)

    def grads(self, need_a: bool, need_b: bool) -> tuple[dict[str, Any], tuple[int, int, int], int]:
        """Block sizes, grid (column blocks, splits of the rows, experts) and tiles of a split."""
        groups, rank, per_group, k = (len(self.sizes["OFFSETS"]), *(self.sizes[s] for s in ("RANK", "NG", "K")))
        chosen = config("lora_grads_kernel", self.capability, self.dtype.itemsize, self.rank)
        own = padded_rank(rank)
        blocks = (-(-k // chosen.cols) * -(-groups * rank // self.rank) if need_a else 0) + (
            groups * -(-per_group // chosen.cols) * -(-rank // own) if need_b else 0
        )
        experts = max(self.sizes["A_EXPERTS"] if need_a else 1, self.sizes["B_EXPERTS"] if need_b else 1)
        tiles = -(-self.num_rows // chosen.rows)
        splits = max(1, min(PROGRAMS // max(blocks, 1), -(-tiles // MIN_TILES), MAX_SPLITS))
        meta = self._meta(chosen, chosen.rows, self.rank) | dict(BLOCK_RA=self.rank, BLOCK_RB=own)
        return meta, (blocks, splits, experts), -(-tiles // splits)

    def _meta(self, chosen, rows: int, width: int) -> dict[str, Any]:
        return dict(
            self.sizes, BLOCK_M=rows, BLOCK_C=chosen.cols, DOT=dot_dtype(self.dtype), PRECISION=precision(self.dtype),
            num_warps=chosen.num_warps, num_stages=chosen.num_stages,
            maxnreg=register_limit(self.dtype.itemsize, width),
        )  # fmt: skip


def make_plan(batch: int, tokens: int, lora_a, lora_b, a_index, b_index, offsets, width: int) -> Plan:
    """The banks, indices and offsets are the op's; width: the output's columns."""
    if batch * tokens > MAX_ROWS:
        raise ValueError(f"x: got {batch * tokens} rows, expected at most {MAX_ROWS} for the Triton kernels")
    groups = len(offsets)
    per_group, rank = lora_b.shape[1] // groups, lora_b.shape[2]
    block = padded_rank(groups * rank)
    sides = [_side(i, bank.shape[0], tokens, block) for i, bank in ((a_index, lora_a), (b_index, lora_b))]
    perm = None
    if batch * tokens > MIN_SORTED and any(side.sort for side in sides):
        key = None
        for side, experts in zip(sides, (lora_a.shape[0], lora_b.shape[0]), strict=True):
            if side.sort:
                ids = side.index.view(batch, -1).expand(batch, tokens).reshape(-1).long()
                key = ids if key is None else key * experts + ids
        perm = torch.sort(key, stable=True)[1]
    sizes = dict(
        K=lora_a.shape[2], RANK=rank, NG=per_group, OFFSETS=tuple(offsets),
        A_EXPERTS=lora_a.shape[0], B_EXPERTS=lora_b.shape[0], WIDTH=width,
    )  # fmt: skip
    return Plan(
        batch * tokens, sides[0].index, sides[1].index, sides[0].divisor, sides[1].divisor, perm,
        sides[0].wide, sides[1].wide, sizes, block, lora_a.dtype, capability(lora_a.device),
    )  # fmt: skip


class _Side(NamedTuple):
    """Row n goes through expert index[n // divisor]; wide: experts multiplied at once, padded; sort: group the rows."""

    index: torch.Tensor | None
    divisor: int
    wide: int
    sort: bool


def _side(index: torch.Tensor | None, experts: int, tokens: int, block: int) -> _Side:
    if index is None:
        return _Side(None, 1, 0, False)
    per_token = index.dim() == 2
    mixed = experts > 1 and (per_token or tokens < MIN_SPAN)
    padded = 1 << (experts - 1).bit_length()
    wide = padded if mixed and padded * block <= MAX_WIDTH else 0
    return _Side(index.contiguous(), 1 if per_token else max(tokens, 1), wide, mixed and not wide)


@functools.cache
def dropout_constants(dropout_p: float) -> tuple[int, float]:
    """The mask's bound as a signed 32-bit number (ops/_dropout.py), and 1 / (1 - p)."""
    return int(dropout_p * 2**32) - 2**31, 1.0 / (1.0 - dropout_p)
