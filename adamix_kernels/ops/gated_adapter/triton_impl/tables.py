"""Shipped block sizes: those of the routed adapter's tiles, of all experts' columns; not measured."""

from __future__ import annotations

from ..._row_tiles import ROW_TILES, WEIGHT_TILES
from ..._triton_tables import Config, Table, lookup
from .plan import Plan

# All experts' columns are activated, and those of 256 leave no registers for more rows.
_ROWS: Table = {arch: {**tiles, (2, 256): Config(16, 64, 8, 2)} for arch, tiles in ROW_TILES.items()}
# Where a row's slots name its experts, 128 columns leave registers for one program on a multiprocessor of 8.0, whatever
# the step, and half as many steps are a quarter fewer instructions; other 8.x have not the shared memory.
_CHOSEN: Table = {**_ROWS, 80: {**_ROWS[80], (2, 128): Config(64, 128, 8, 2)}, 86: _ROWS[80], 90: _ROWS[80]}
_GRAD: Table = {arch: {**tiles, (2, 64): Config(64, 64, 8, 3)} for arch, tiles in _ROWS.items()}
# Every block of features reads all experts' columns again: the more features, the fewer times.
_WEIGHT: Table = {arch: {**tiles, (2, 256): Config(32, 32, 8, 2)} for arch, tiles in WEIGHT_TILES.items()}
_WEIGHT_ASYNC = {**_WEIGHT[90], (2, 64): Config(64, 128, 4, 3), (2, 128): Config(64, 128, 8, 3)}
# One expert's widest columns beside those of its bias: the row tiles' sizes spill hundreds of registers.
_SHRINK: Table = {
    arch: {
        **ROW_TILES[80 if arch == 90 else arch],
        (2, 256): Config(64, 64 if 90 <= arch < 120 else 32, 8, 2),
        (4, 128): Config(16, 16, 8, 2),
        (4, 256): Config(16, 16, 8, 2),
    }
    for arch in (80, 90, 100, 120)
}
TABLES: dict[str, Table] = {
    "gated_adapter_forward_kernel": _ROWS,
    "gated_adapter_input_grad_kernel": _GRAD,
    "gated_adapter_weight_grad_kernel": {**_WEIGHT, 90: _WEIGHT_ASYNC},
    "gated_adapter_rows_shrink_kernel": _SHRINK,
    "gated_adapter_rows_forward_kernel": ROW_TILES,
    "gated_adapter_rows_grad_kernel": ROW_TILES,
    "gated_adapter_rows_weight_grad_kernel": WEIGHT_TILES,
}


def rows_table(kernel: str, plan: Plan) -> Table:
    """The block sizes of a kernel of row tiles."""
    chosen = kernel == "gated_adapter_forward_kernel" and plan.up.kind == "chosen"
    return _CHOSEN if chosen else TABLES[kernel]


def may_stay(kernel: str, capability: int, plan: Plan) -> bool:
    """Whether rows of x may stay in registers: beside all that the backward computes they spill but on big GPUs."""
    if kernel != "gated_adapter_input_grad_kernel":
        return True
    return 90 <= capability < 120 and plan.width >= 64 and not plan.weights


def config(kernel: str, capability: int, itemsize: int, width: int) -> Config:
    """The block sizes of `kernel` (its function's name)."""
    return lookup(kernel, TABLES[kernel], capability, itemsize, width)
