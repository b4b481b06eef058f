"""Block sizes of the kernels that hold a tile of rows and its experts' narrow columns: shipped, not yet measured."""

from __future__ import annotations

from typing import Any

import triton

from ._triton_tables import Config, Table, lookup, tuned

# mma.sync: 8.x and 12.x (at most 99 KB of shared memory a program). 9.0 and 10.0 have asynchronous units.
_TILE = {
    (2, 16): Config(64, 64, 4, 4),
    (2, 32): Config(64, 64, 4, 4),
    (2, 64): Config(64, 64, 4, 3),
    (2, 128): Config(64, 64, 8, 2),
    (2, 256): Config(32, 64, 8, 2),
    (4, 16): Config(32, 64, 4, 3),
    (4, 32): Config(32, 64, 4, 3),
    (4, 64): Config(32, 32, 4, 3),
    (4, 128): Config(16, 32, 8, 2),
    (4, 256): Config(16, 32, 8, 2),
}
# Tensor memory takes its own registers to read.
ROW_TILES: Table = {80: _TILE, 100: _TILE | {(2, 64): Config(64, 64, 8, 3)}, 120: _TILE}
_WEIGHT = {
    (2, 16): Config(32, 128, 4, 4),
    (2, 32): Config(32, 128, 4, 4),
    (2, 64): Config(64, 64, 4, 3),
    (2, 128): Config(64, 64, 8, 2),
    (2, 256): Config(32, 64, 8, 2),
    (4, 16): Config(32, 128, 4, 2),
    (4, 32): Config(32, 128, 4, 2),
    (4, 64): Config(32, 64, 4, 2),
    (4, 128): Config(32, 64, 8, 2),
    (4, 256): Config(16, 32, 8, 2),
}
_WEIGHT_ASYNC = _WEIGHT | {(2, 16): Config(64, 128, 4, 3), (2, 32): Config(64, 128, 4, 3)}
WEIGHT_TILES: Table = {
    80: _WEIGHT, 90: _WEIGHT_ASYNC, 100: _WEIGHT_ASYNC | {(4, 128): Config(16, 64, 8, 2)}, 120: _WEIGHT,
}  # fmt: skip
# Steps that the second loop over the features loads ahead, where the first one's are the table's stages; the widest
# banks have neither registers nor shared memory for one.
EXPAND_AHEAD, EXPAND_WIDTH = 2, 128
# Tuples of tiles: Triton 3.3.
KEEPS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 3)


def row_tile(
    kernel: str, shipped: Table, capability: int, itemsize: int, width: int, hidden: int, stays: bool
) -> tuple[Config, bool]:
    """The block sizes of a kernel that reads rows of `hidden` features twice, and whether they stay on the chip.

    stays: whether the second read is of the same rows as the first. A measured table goes first: with a tile whose rows
    fit in registers where they stay, with any other where they do not.
    """
    if stays and KEEPS:
        tile = tuned(kernel, capability, itemsize, width)
        fits = itemsize == 2 and width <= 64 and hidden > 0
        if tile is None or hidden % tile.cols or _registers(tile, hidden) > 128 or not fits:
            tile = kept_tile(capability, itemsize, width, hidden)
        if tile is not None:
            return tile, True
    return lookup(kernel, shipped, capability, itemsize, width), False


def kept_tile(capability: int, itemsize: int, width: int, hidden: int) -> Config | None:
    """The block sizes with which the rows of a tile stay in registers, or None where they should not.

    A thread holds at most 128 registers of them, half of what it has; four warps are two programs on a multiprocessor.
    Tall tiles suit wide banks, as every program reads the whole bank through L2, and need much shared memory.
    """
    if itemsize != 2 or width > 64 or hidden % 64 or not hidden:
        return None
    much = 90 <= capability < 120
    sizes: tuple[tuple[int, int], ...]
    cols = next(c for c in (256 if much and width <= 32 else 128, 128, 64) if hidden % c == 0)
    if much and width > 32:
        sizes, stages = ((64, 4), (64, 8), (32, 8)), 3
    else:
        sizes, stages = ((64, 4), (32, 4), (16, 4), (16, 8)), 4 if much else 2 if width <= 32 else 1
    # Two programs' share: of 99 KB (8.6, 8.9, 12.x), of 164, of 227.
    shared = 48 << 10 if capability in (86, 89) or capability >= 120 else 80 << 10
    for rows, warps in sizes:
        tile = Config(rows, cols, warps, stages)
        if 2 * rows < width:
            continue
        if _registers(tile, hidden) <= 128 and (much or 2 * (rows * hidden + stages * cols * width) <= shared):
            return tile
    return None


def _registers(tile: Config, hidden: int) -> int:
    """Of a thread, for the tile's rows in 16 bits."""
    return -(-tile.rows * hidden // (64 * tile.num_warps))


def tile_options(tile: Config, keep: bool, itemsize: int, width: int, masked: bool) -> dict[str, Any]:
    """The constants and compile options of a kernel of row tiles."""
    return dict(
        ROWS=tile.rows,
        COLS=tile.cols,
        AHEAD=tile.num_stages - 1 if keep else EXPAND_AHEAD if width <= EXPAND_WIDTH else 1,
        KEEP=keep,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=register_limit(itemsize, width, masked),
    )


def register_limit(itemsize: int, width: int, masked: bool) -> int | None:
    """maxnreg of a tile kernel: without one ptxas spills two registers of the widest masked tile for occupancy."""
    return 128 if masked and (itemsize, width) == (2, 256) else None
