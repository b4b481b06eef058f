"""What the ahead-of-time gate compiles: every kernel and dtype, few and many classes, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..._triton_aot import POINTERS, AotCase, make_case
from .backward import pair_grad_kernel
from .forward import pair_finish_kernel, pair_parts_kernel, pair_rows_kernel
from .plan import MAX_REGISTERS, PART_ROWS, SUM_ROWS, make_tiles

# name -> (classes, row pairs, whether V and the rows' strides are multiples of 16)
_SHAPES = {
    "v2": (2, 32, False),
    "v64": (64, 8192, True),
    "v50257": (50257, 8192, False),
    "v128256": (128256, 8192, True),
}
_STRIDES = ("a_outer", "a_inner", "b_outer", "b_inner", "l_outer", "l_inner", "m_outer", "m_inner")


def aot_cases(capability: int = 90) -> Iterator[AotCase]:
    """Every case; the blocks are the same on every GPU. Full gradients and label smoothing, the widest variant."""
    for dtype, pointer in POINTERS.items():
        for name, (classes, rows, even) in _SHAPES.items():
            tiles = make_tiles(rows, classes)
            blocks = dict(ROWS=tiles.rows, COLS=tiles.cols)
            divisible = ("V", *_STRIDES[:4]) if even else ()
            common = _common(pointer) | blocks
            arguments = common | dict(scales="*fp32", stats="*fp32", rows="*fp32", da=None, db=None)
            yield make_case(pair_rows_kernel, name, dtype, arguments, divisible, tiles.num_warps, MAX_REGISTERS)
            grads = dict(stats=None, da=pointer, db=pointer)
            yield make_case(
                pair_rows_kernel, f"{name}_grads", dtype, arguments | grads, divisible, tiles.num_warps, MAX_REGISTERS
            )
            arguments = common | grads | dict(grad="*fp32", g_outer="i32", g_inner="i32", weight="fp32")
            arguments |= dict(stats="*fp32", scales="*fp32")
            yield make_case(pair_grad_kernel, name, dtype, arguments, divisible, tiles.num_warps, MAX_REGISTERS)
            if classes > tiles.cols:
                arguments = common | dict(parts="*fp32", chunks="i32")
                yield make_case(pair_parts_kernel, name, dtype, arguments, divisible, tiles.num_warps, MAX_REGISTERS)
            else:
                yield make_case(
                    pair_finish_kernel, f"{name}_logits", dtype, _finish(common, "logits"), divisible, 4, MAX_REGISTERS
                )
        for source, rows in (("rows", SUM_ROWS), ("parts", PART_ROWS)):
            blocks = dict(ROWS=rows, COLS=16)
            yield make_case(
                pair_finish_kernel, source, dtype, _finish(_common(pointer) | blocks, source), (), 4, MAX_REGISTERS
            )


def _common(pointer: str) -> dict[str, Any]:
    arguments = dict(a=pointer, b=pointer, labels="*i64", mask="*i1", smoothing="fp32", SMOOTH=True, FULL=True)
    return arguments | dict.fromkeys((*_STRIDES, "n", "inner", "V", "ignore_index"), "i32")


def _finish(common: dict[str, Any], source: str) -> dict[str, Any]:
    arguments = dict(weight="fp32", splits="i32", share="i32", num_items="*i64", SOURCE=source, MEAN=True)
    tensors = ("parts", "stats", "rows", "loss", "cross_entropy", "consistency", "scales")
    return common | arguments | dict.fromkeys(tensors, "*fp32")
