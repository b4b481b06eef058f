"""Shipped block sizes: from ahead-of-time compilation (registers, spills, shared memory), not yet from measurement."""

from __future__ import annotations

from ..._triton_tables import Config, lookup

# By GPU, then (bytes of an element, width): width is the padded rank, times the padded experts where all are
# multiplied at once. Config(rows, cols, num_warps, num_stages); few rows in a call lower `rows`.
_TILE = {
    80: {
        (2, 16): Config(32, 256, 4, 3),
        (2, 32): Config(32, 256, 4, 3),
        (2, 64): Config(32, 128, 4, 3),
        (2, 128): Config(32, 128, 4, 3),
        (2, 256): Config(32, 64, 8, 2),
        (4, 16): Config(32, 64, 4, 2),
        (4, 32): Config(32, 32, 4, 2),
        (4, 64): Config(32, 32, 4, 2),
        (4, 128): Config(16, 32, 4, 2),
        (4, 256): Config(16, 32, 8, 2),
    },
}
_GRADS = {
    80: {
        (2, 16): Config(64, 128, 4, 3),
        (2, 32): Config(64, 128, 4, 3),
        (2, 64): Config(64, 128, 4, 2),
        (2, 128): Config(64, 128, 8, 2),
        (2, 256): Config(64, 64, 8, 2),
        (4, 16): Config(32, 128, 4, 2),
        (4, 32): Config(32, 128, 4, 2),
        (4, 64): Config(32, 64, 4, 2),
        (4, 128): Config(32, 64, 8, 2),
        (4, 256): Config(32, 32, 8, 1),
    },
}
# maxnreg: without a limit of its own ptxas spills a few registers to reach its next step of occupancy.
MAX_REGISTERS = 255
TABLES = {"lora_forward_kernel": _TILE, "lora_dx_kernel": _TILE, "lora_grads_kernel": _GRADS}


def config(kernel: str, capability: int, itemsize: int, width: int) -> Config:
    """The block sizes of `kernel` (its function's name)."""
    return lookup(kernel, TABLES[kernel], capability, itemsize, width)
