"""How rows are found in memory and cut into tiles: from shapes and strides alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# Up to CHUNK classes are one tile with as many rows as fill TILE elements, MAX_ROWS at most; beyond, one row.
TILE, CHUNK, MAX_ROWS = 1024, 4096, 256
# Programs that fill a GPU, programs that share all tiles between them, tiles that one program does alone (which
# saves the others' ticket, a fill), rows a step of the sum of parts.
PROGRAMS, GRID, ALONE, PART_ROWS = 264, 1056, 4, 128
# Labels that all programs together may read to find the number of rows; beyond, one counts first.
MAX_COUNTED = 2**24
# Without a limit of its own ptxas spills a few registers to reach its next step of occupancy.
MAX_REGISTERS = 255


class Tiles(NamedTuple):
    """rows x cols a tile; splits: parts of a row, of `share` columns each."""

    rows: int
    cols: int
    num_warps: int
    tiles: int
    splits: int
    share: int


class Rows(NamedTuple):
    """Both passes as [outer, inner, V], row n at (n // inner, n % inner); labels and mask as [outer, inner]."""

    a: torch.Tensor
    b: torch.Tensor
    labels: torch.Tensor | None
    mask: torch.Tensor | None

    @property
    def count(self) -> int:
        return self.a.shape[0] * self.a.shape[1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """n, inner, strides of a, b, labels and mask, V: the kernels' arguments, in elements."""
        strides = [self.a.stride()[:2], self.b.stride()[:2], *(two_strides(t) for t in (self.labels, self.mask))]
        return self.count, max(1, self.a.shape[1]), *(s for pair in strides for s in pair), self.a.shape[2]


def two_strides(t: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else t.stride()


def make_rows(a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor | None, mask: torch.Tensor | None) -> Rows:
    """a, b: [..., V] each; views of them where their strides allow."""
    return Rows(as_rows(a), as_rows(b), as_pairs(labels), as_pairs(mask))


def as_rows(logits: torch.Tensor) -> torch.Tensor:
    *leading, classes = logits.shape
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits.reshape(*_two(leading), classes)


def as_pairs(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.reshape(_two(t.shape))


def _two(leading) -> tuple[int, int]:
    return (leading[0], math.prod(leading[1:])) if len(leading) else (1, 1)


def make_tiles(rows: int, classes: int) -> Tiles:
    cols = min(CHUNK, 1 << max(1, classes - 1).bit_length())
    height = max(1, min(TILE // cols, MAX_ROWS))
    tiles, share, splits = -(-rows // height), classes, 1
    if classes > cols and rows:
        chunks = -(-classes // cols)
        splits = max(1, min(chunks, PROGRAMS // tiles))
        share = -(-chunks // splits) * cols
        splits = -(-classes // share)
    return Tiles(height, cols, 8 if cols > 2 * TILE else 4, tiles, splits, share)


def counts_alone(rows: Rows, num_items: torch.Tensor | None, tiles: Tiles) -> bool:
    """Whether every program of the forward finds the number of rows itself."""
    known = num_items is not None or (rows.labels is None and rows.mask is None)
    return known or min(tiles.tiles, GRID) * rows.count <= MAX_COUNTED
