"""Shipped block sizes: from ahead-of-time compilation (registers, spills, shared memory), not yet from measurement."""

from __future__ import annotations

from ..._triton_tables import Config, lookup

# Programs on a multiprocessor that hide each other's latency: in 16 bits, of one expert a tile and r up to
# RESIDENT_RANK. Wider tiles and float32 make do with one.
RESIDENT, RESIDENT_RANK = 3, 16
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
# Tensor memory takes its own registers to read.
_TILE_100 = _TILE | {(2, 64): Config(64, 64, 8, 3)}
_WEIGHT_100 = _WEIGHT_ASYNC | {(4, 128): Config(16, 64, 8, 2)}
TABLES = {
    "adapter_forward_kernel": {80: _TILE, 100: _TILE_100, 120: _TILE},
    "adapter_input_grad_kernel": {80: _TILE, 100: _TILE_100, 120: _TILE},
    "adapter_weight_grad_kernel": {80: _WEIGHT, 90: _WEIGHT_ASYNC, 100: _WEIGHT_100, 120: _WEIGHT},
}


def config(kernel: str, capability: int, itemsize: int, width: int) -> Config:
    """The block sizes of `kernel` (its function's name)."""
    return lookup(kernel, TABLES[kernel], capability, itemsize, width)


def sums_by_dot(capability: int, itemsize: int, width: int) -> bool:
    """Whether the weight gradients' kernel sums columns of its tile by a dot with ones, not in registers.

    It must where dots are asynchronous (9.0 and 10.0; float32 is split in registers first). Elsewhere it is cheaper for
    narrow tiles; beyond, a second dot has every warp compute the whole activation.
    """
    return itemsize == 2 and (90 <= capability < 120 or width <= 32)


def register_limit(itemsize: int, width: int, masked: bool) -> int | None:
    """maxnreg of a tile kernel: without one ptxas spills two registers of the widest masked tile for occupancy."""
    return 128 if masked and (itemsize, width) == (2, 256) else None
