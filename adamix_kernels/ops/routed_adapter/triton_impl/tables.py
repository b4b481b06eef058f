"""Shipped block sizes: from ahead-of-time compilation (registers, spills, shared memory), not yet from measurement."""

from __future__ import annotations

from ... import _row_tiles
from ..._row_tiles import ROW_TILES, WEIGHT_TILES, kept_tile, register_limit, tile_options
from ..._triton_tables import Config, Table, lookup

__all__ = ["RESIDENT", "RESIDENT_RANK", "TABLES", "config", "kept_tile", "register_limit", "row_tile", "sums_by_dot"]
__all__ += ["tile_options"]

# Programs on a multiprocessor that hide each other's latency: in 16 bits, of one expert a tile and r up to
# RESIDENT_RANK. Wider tiles and float32 make do with one.
RESIDENT, RESIDENT_RANK = 3, 16
TABLES: dict[str, Table] = {
    "adapter_forward_kernel": ROW_TILES,
    "adapter_input_grad_kernel": ROW_TILES,
    "adapter_weight_grad_kernel": WEIGHT_TILES,
}


def config(kernel: str, capability: int, itemsize: int, width: int) -> Config:
    """The block sizes of `kernel` (its function's name)."""
    return lookup(kernel, TABLES[kernel], capability, itemsize, width)


def row_tile(kernel: str, capability: int, itemsize: int, width: int, hidden: int, stays: bool) -> tuple[Config, bool]:
    """The block sizes of a kernel that reads rows twice, and whether they stay on the chip; see ops/_row_tiles."""
    return _row_tiles.row_tile(kernel, TABLES[kernel], capability, itemsize, width, hidden, stays)


def sums_by_dot(capability: int, itemsize: int, width: int) -> bool:
    """Whether the weight gradients' kernel sums columns of its tile by a dot with ones, not in registers.

    It must where dots are asynchronous (9.0 and 10.0; float32 is split in registers first). Elsewhere it is cheaper for
    narrow tiles; beyond, a second dot has every warp compute the whole activation.
    """
    return itemsize == 2 and (90 <= capability < 120 or width <= 32)
