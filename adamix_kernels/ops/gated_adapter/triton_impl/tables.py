"""Shipped block sizes: those of the routed adapter's tiles, of all experts' columns; not measured."""

from __future__ import annotations

from ..._row_tiles import ROW_TILES, WEIGHT_TILES
from ..._triton_tables import Config, Table, lookup

# Every block of features reads all experts' columns again: the more features, the fewer times.
_WEIGHT_ASYNC = {**WEIGHT_TILES[90], (2, 64): Config(64, 128, 4, 3), (2, 128): Config(64, 128, 8, 3)}
TABLES: dict[str, Table] = {
    "gated_adapter_forward_kernel": ROW_TILES,
    "gated_adapter_input_grad_kernel": ROW_TILES,
    "gated_adapter_weight_grad_kernel": {**WEIGHT_TILES, 90: _WEIGHT_ASYNC},
}


def config(kernel: str, capability: int, itemsize: int, width: int) -> Config:
    """The block sizes of `kernel` (its function's name)."""
    return lookup(kernel, TABLES[kernel], capability, itemsize, width)
