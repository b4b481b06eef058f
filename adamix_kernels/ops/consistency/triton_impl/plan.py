"""How rows are found in memory and shared out to programs: from shapes, strides and addresses alone."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

# Up to FEW classes a tile holds whole rows, as many as fill TILE elements, MAX_ROWS at most. Up to ALONE elements are
# one program's, in one launch, by tiles of 4 * TILE.
FEW, TILE, MAX_ROWS, ALONE = 4096, 1024, 2048, 16384
# Programs of the kernels for few classes that share all tiles between them.
GRID = 1056
# Beyond FEW, a program takes row after row. Row pairs of up to WIDE bytes: two programs of 8 warps on a multiprocessor;
# beyond, one of 16. So are pairs of 16-bit logits of at least LARGE such steps that are read twice: the fewer
# programs, the more of their rows is in L2 still. Of those, registers hold up to HELD steps, or fewer where options
# take registers.
WIDE, LARGE, HELD, HELD_FULL = 1 << 18, 4, 7, 3
# Pieces of a row pair: those that are copied ahead, and the one in use. Registers of a thread: without a limit of its
# own ptxas spills a few to reach its next step of occupancy.
STAGES, WIDE_REGISTERS, MAX_REGISTERS = 4, 128, 255
# Multiprocessors where there is no GPU to ask.
PROCESSORS = 132


class Tiles(NamedTuple):
    """rows x cols a tile, of whole rows; programs: that share the tiles."""

    rows: int
    cols: int
    num_warps: int
    tiles: int
    programs: int


class Wide(NamedTuple):
    """cols: of a step, `vector` of them a lane, 16 bytes; registers of a thread; resident: programs that a
    multiprocessor holds; held: steps of a row that stay in registers, of every row there are as many; rest: columns of
    a lane in what the steps leave of a row."""

    cols: int
    vector: int
    num_warps: int
    registers: int
    resident: int
    held: int
    rest: int


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
    def classes(self) -> int:
        return self.a.shape[2]

    @property
    def sizes(self) -> tuple[int, ...]:
        """n, inner, strides of a, b, labels and mask, V: the kernels' arguments, in elements."""
        strides = [self.a.stride()[:2], self.b.stride()[:2], *(two_strides(t) for t in (self.labels, self.mask))]
        return self.count, max(1, self.a.shape[1]), *(s for pair in strides for s in pair), self.classes


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
    """For up to FEW classes, but `rescale`, which takes any number in tiles of FEW."""
    cols = min(FEW, 1 << max(1, classes - 1).bit_length())
    alone = TILE < rows * cols <= ALONE
    height = max(1, min((4 if alone else 1) * TILE // cols, MAX_ROWS))
    tiles = -(-rows // height)
    programs = 1 if alone or tiles <= 1 else min(tiles, GRID)
    return Tiles(height, cols, 8 if cols * height > 2 * TILE else 4, tiles, programs)


def kept_steps(gradient: bool, full: bool, smooth: bool) -> int:
    """How many of a row's steps registers can hold from one pass to the next."""
    return 0 if not gradient else HELD_FULL if full or smooth else HELD


def make_wide(classes: int, itemsize: int, aligned: bool = True, keep: int = 0) -> Wide:
    """keep: steps to hold, at most; 0: a row is read once."""
    if not aligned:
        # Element by element: addresses take registers, so that fewer are in flight.
        return Wide(32 * 8 * 4, 4, 8, MAX_REGISTERS, 1, 0, 4)
    vector, keep = 16 // itemsize, keep if itemsize == 2 else 0
    # Of any row, whose first columns may lie before its first vector.
    steps = (classes - vector + 1) // (32 * vector)
    warps, resident = (16, 1) if (steps >= 16 * LARGE if keep else 2 * classes * itemsize > WIDE) else (8, 2)
    steps //= warps
    # The others are taken two at a time.
    held = min(steps, keep - max(0, steps - keep) % 2) if keep else 0
    lanes, rest = 32 * warps, vector
    left = classes - steps * lanes * vector
    # Half the lanes' columns or fewer need as few instructions.
    while itemsize == 2 and rest > 2 and left <= lanes * rest // 2:
        rest //= 2
    return Wide(lanes * vector, vector, warps, WIDE_REGISTERS, resident, held, rest)


def stages(aligned: bool, stores: bool) -> int:
    """Vectors of gradients that begin elsewhere than the logits' are made in shared memory, in place of a piece."""
    return STAGES - 1 if aligned and not stores else STAGES


def wide_programs(rows: int, wide: Wide, device: torch.device) -> int:
    return max(1, min(rows, wide.resident * _processors(device.type, device.index)))


@functools.cache
def _processors(device_type: str, index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count if device_type == "cuda" else PROCESSORS


def phase(rows: torch.Tensor, vector: int) -> int:
    """Elements between the address of a row's tensor and the 16-byte boundary before it."""
    return rows.data_ptr() // rows.element_size() % vector


def in_step(first: torch.Tensor, second: torch.Tensor | None, vector: int) -> bool:
    """Whether every row of both, [outer, inner, V], lies equally far from a 16-byte boundary; None agrees."""
    if second is None:
        return True
    steps = zip(first.stride()[:2], second.stride()[:2], first.shape[:2], strict=True)
    same = all(size <= 1 or (one - other) % vector == 0 for one, other, size in steps)
    return same and phase(first, vector) == phase(second, vector)
