"""What the ahead-of-time gate compiles: every kernel and dtype, few and many classes, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..._triton_aot import POINTERS, AotCase, make_case
from .backward import pair_grad_kernel, rescale_kernel
from .finish import pair_count_kernel
from .forward import pair_parts_kernel, pair_rows_kernel
from .plan import MAX_REGISTERS, PART_ROWS, make_tiles

# name -> (classes, row pairs, whether V and the rows' strides are multiples of 16)
_SHAPES = {
    "v2": (2, 32, False),
    "v64": (64, 8192, True),
    "v50257": (50257, 8192, False),
    "v128256": (128256, 8192, True),
}
# Where every variant is compiled: tiles of many rows, and one row.
_EVERY = ("v64", "v50257")
_STRIDES = ("a_outer", "a_inner", "b_outer", "b_inner", "l_outer", "l_inner", "m_outer", "m_inner")
_SCALARS = ("loss", "cross_entropy", "consistency", "factor")


def aot_cases(capability: int = 90) -> Iterator[AotCase]:
    """Every case; the blocks are the same on every GPU. Full gradients and label smoothing, the widest variant."""
    for dtype, pointer in POINTERS.items():
        for name, (classes, rows, even) in _SHAPES.items():
            tiles = make_tiles(rows, classes)
            divisible = ("V", *_STRIDES[:4]) if even else ()
            rest = divisible, tiles.num_warps, MAX_REGISTERS
            common = _common(pointer) | dict(ROWS=tiles.rows, COLS=tiles.cols)
            none, grads = dict(da=None, db=None), dict(da=pointer, db=pointer)
            forward = common | dict(tiles="i32", FINISH=True, COUNT=True, MEAN=True, SMOOTH=True, INPLACE=False)
            forward |= dict(ticket="*i32", num_items=None) | dict.fromkeys(_SCALARS, "*fp32")
            yield make_case(pair_rows_kernel, name, dtype, forward | none, *rest)
            yield make_case(pair_rows_kernel, f"{name}_grads", dtype, forward | grads, *rest)
            backward = common | grads | dict.fromkeys(("g_outer", "g_inner", "row_tiles", "col_tiles"), "i32")
            backward |= dict(grad="*fp32", CORRECT=False, INPLACE=False, HELD=False)
            yield make_case(pair_grad_kernel, name, dtype, backward, *rest)
            if name in _EVERY:
                yield make_case(pair_rows_kernel, f"{name}_over", dtype, forward | grads | dict(INPLACE=True), *rest)
                yield make_case(pair_grad_kernel, f"{name}_correct", dtype, backward | dict(CORRECT=True), *rest)
                sizes = ("n", "inner", "V", "row_tiles", "col_tiles", "outer_stride", "inner_stride")
                scaled = dict.fromkeys(sizes, "i32") | dict(x=pointer, factor="*fp32", ROWS=tiles.rows, COLS=tiles.cols)
                aligned = ("V", "outer_stride", "inner_stride") if even else ()
                yield make_case(rescale_kernel, name, dtype, scaled, aligned, tiles.num_warps)
                pairs = dict(labels=None, cross_entropy=None, consistency=None)
                one = pairs | dict(mask=None, db=None, ticket=None)
                yield make_case(pair_rows_kernel, f"{name}_pairs", dtype, forward | grads | one, *rest)
                yield make_case(pair_grad_kernel, f"{name}_pairs", dtype, backward | pairs, *rest)
            if classes > tiles.cols:
                chunk = dict(stats=None, num_items=None, ticket=None, FINISH=False, COUNT=False, INPLACE=True)
                chunk |= dict.fromkeys(_SCALARS)
                yield make_case(pair_rows_kernel, f"{name}_chunk", dtype, forward | grads | chunk, *rest)
                over = dict(grad=None, INPLACE=True, HELD=pointer == "*fp16")
                yield make_case(pair_grad_kernel, f"{name}_over", dtype, backward | over, *rest)
                parts = dict(parts="*fp32", PART_ROWS=PART_ROWS) | dict.fromkeys(("chunks", "splits", "share"), "i32")
                yield make_case(pair_parts_kernel, name, dtype, forward | parts, *rest)
        yield make_case(pair_count_kernel, "rows", dtype, _common(pointer) | dict(num_items=None, ticket="*i32"), (), 8)


def _common(pointer: str) -> dict[str, Any]:
    arguments = dict(a=pointer, b=pointer, labels="*i64", mask="*i1", stats="*fp32", rows="*fp32", scales="*fp32")
    arguments |= dict(smoothing="fp32", weight="fp32", FULL=True)
    return arguments | dict.fromkeys((*_STRIDES, "n", "inner", "V", "ignore_index"), "i32")
