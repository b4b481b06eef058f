"""What the ahead-of-time gate compiles: every kernel and dtype, few and many classes, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..._triton_aot import POINTERS, AotCase, make_case
from .backward import pair_grad_kernel, rescale_kernel
from .finish import pair_count_kernel
from .forward import pair_rows_kernel
from .plan import MAX_REGISTERS, kept_steps, make_tiles, make_wide, stages
from .wide import pair_wide_grad_kernel, pair_wide_kernel

# name -> (classes, row pairs, whether V and the rows' strides are multiples of 16)
_FEW = {"v2": (2, 32, False), "v64": (64, 8192, True), "v4000": (4000, 8192, True)}
# name -> (classes, whether V and the rows' strides are multiples of 16)
_MANY = {"v50257": (50257, False), "v128256": (128256, True)}
# Where every variant is compiled: tiles of many rows; rows of odd size.
_EVERY = ("v64", "v50257")
_STRIDES = ("a_outer", "a_inner", "b_outer", "b_inner", "l_outer", "l_inner", "m_outer", "m_inner")
_SCALARS = ("loss", "cross_entropy", "consistency")
# Without labels; one gradient, and nobody to wait for.
_PAIRS = dict(labels=None, cross_entropy=None, consistency=None)
_ONE = _PAIRS | dict(mask=None, db=None, ticket=None)
# A chunk of linear_adamix_loss.
_CHUNK = dict(stats=None, ticket=None, FINISH=False, INPLACE=True) | dict.fromkeys(_SCALARS)


def aot_cases(capability: int = 90) -> Iterator[AotCase]:
    """Every case; the blocks are the same on every GPU. Full gradients and label smoothing, the widest variant."""
    for dtype, pointer in POINTERS.items():
        yield from _few(dtype, pointer)
        yield from _many(dtype, pointer)
        counts = _common(pointer) | dict(num_items=None, ticket="*i32", MEAN=True)
        yield make_case(pair_count_kernel, "rows", dtype, counts, (), 8)


def _few(dtype, pointer: str) -> Iterator[AotCase]:
    for name, (classes, rows, even) in _FEW.items():
        tiles = make_tiles(rows, classes)
        rest = ("V", *_STRIDES[:4]) if even else (), tiles.num_warps, MAX_REGISTERS
        common = _common(pointer) | dict(ROWS=tiles.rows, COLS=tiles.cols, INPLACE=False, tiles="i32")
        none, grads = dict(da=None, db=None), dict(da=pointer, db=pointer)
        forward = common | _finish() | dict(COUNT=tiles.programs == 1, MEAN=True, num_items=None)
        yield make_case(pair_rows_kernel, f"{name}_grads", dtype, forward | grads, *rest)
        backward = common | grads | _incoming()
        yield make_case(pair_grad_kernel, name, dtype, backward, *rest)
        if name in _EVERY:
            yield make_case(pair_rows_kernel, name, dtype, forward | none, *rest)
            yield make_case(pair_rows_kernel, f"{name}_over", dtype, forward | grads | dict(INPLACE=True), *rest)
            yield make_case(pair_rows_kernel, f"{name}_pairs", dtype, forward | grads | _ONE, *rest)
            yield make_case(pair_rows_kernel, f"{name}_chunk", dtype, forward | grads | _CHUNK, *rest)
            yield make_case(pair_grad_kernel, f"{name}_correct", dtype, backward | dict(CORRECT=True), *rest)
            yield make_case(pair_grad_kernel, f"{name}_pairs", dtype, backward | _PAIRS, *rest)
            yield make_case(pair_grad_kernel, f"{name}_over", dtype, backward | dict(INPLACE=True), *rest)
        sizes = ("n", "inner", "V", "row_tiles", "col_tiles", "outer_stride", "inner_stride")
        scaled = dict.fromkeys(sizes, "i32") | dict(x=pointer, factor="*fp32", ROWS=tiles.rows, COLS=tiles.cols)
        aligned = ("V", "outer_stride", "inner_stride") if even else ()
        yield make_case(rescale_kernel, name, dtype, scaled, aligned, tiles.num_warps)


def _many(dtype, pointer: str) -> Iterator[AotCase]:
    for name, (classes, even) in _MANY.items():
        once = make_wide(classes, dtype.itemsize)

        def case(kernel, label, arguments, wide=None, even=even, classes=classes, once=once):
            divisible = ("V", *_STRIDES[:4]) if even else ()
            if wide is None and kernel is pair_wide_kernel:
                keep = kept_steps(arguments["da"] is not None, arguments["FULL"], arguments["SMOOTH"])
                wide = make_wide(classes, dtype.itemsize, keep=keep)
            wide = wide or once
            arguments = arguments | dict(COLS=wide.cols, VECTOR=wide.vector, REST=wide.rest)
            arguments |= dict(STAGES=stages(arguments["ALIGNED"], arguments["STORES"]))
            if kernel is pair_wide_kernel:
                arguments |= dict(HELD=wide.held)
            made = make_case(kernel, label, dtype, arguments, divisible, wide.num_warps, wide.registers)
            return made._replace(resident=wide.resident)

        common = _common(pointer) | dict(phase="i32", ALIGNED=True, STORES=True, INPLACE=False)
        none, grads = dict(da=None, db=None), dict(da=pointer, db=pointer)
        forward, backward = common | _finish(), common | grads | _incoming()
        yield case(pair_wide_kernel, f"{name}_grads", forward | grads)
        yield case(pair_wide_kernel, f"{name}_detached", forward | grads | dict(FULL=False, SMOOTH=False, mask=None))
        yield case(pair_wide_grad_kernel, name, backward)
        if name in _EVERY:
            yield case(pair_wide_kernel, name, forward | none)
            yield case(pair_wide_kernel, f"{name}_chunk", forward | grads | _CHUNK)
            yield case(pair_wide_kernel, f"{name}_over", forward | grads | dict(INPLACE=True))
            yield case(pair_wide_kernel, f"{name}_pairs", forward | grads | _ONE)
            apart = make_wide(classes, dtype.itemsize, False)
            yield case(pair_wide_kernel, f"{name}_apart", forward | grads | dict(ALIGNED=False, STORES=False), apart)
            yield case(pair_wide_kernel, f"{name}_stores", forward | grads | dict(STORES=False))
            yield case(pair_wide_grad_kernel, f"{name}_correct", backward | dict(CORRECT=True))
            yield case(pair_wide_grad_kernel, f"{name}_over", backward | dict(INPLACE=True))
            yield case(pair_wide_grad_kernel, f"{name}_pairs", backward | _PAIRS)


def _finish() -> dict[str, Any]:
    return dict(FINISH=True, ticket="*i32") | dict.fromkeys(_SCALARS, "*fp32")


def _incoming() -> dict[str, Any]:
    return dict(grad="*fp32", CORRECT=False) | dict.fromkeys(("g_outer", "g_inner"), "i32")


def _common(pointer: str) -> dict[str, Any]:
    arguments = dict(a=pointer, b=pointer, labels="*i64", mask="*i1", stats="*fp32", rows="*fp32", scales="*fp32")
    arguments |= dict.fromkeys(("smoothing", "weight", "expected"), "fp32") | dict(FULL=True, SMOOTH=True)
    return arguments | dict.fromkeys((*_STRIDES, "n", "inner", "V", "ignore_index"), "i32")
