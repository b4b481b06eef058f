"""Argument checks shared by the consistency losses' public functions."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from .._checks import INDEX_DTYPES, check_device, check_flag, fail

# Of num_items, what every backend reads; others are converted.
_COUNT_DTYPES = (torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_number(name: str, value: object, high: float, expected: str) -> None:
    """A finite real number between 0 and high."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        fail(name, type(value).__name__, expected, TypeError)
    if not (0 <= value <= high and value < math.inf):
        fail(name, value, expected)


def check_options(weight: object, ignore_index: object, label_smoothing: object, detach_target: object) -> None:
    check_flag("detach_target", detach_target)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        fail("ignore_index", type(ignore_index).__name__, "an int", TypeError)
    check_number("weight", weight, math.inf, "a finite number >= 0")
    check_number("label_smoothing", label_smoothing, 1.0, "a number in [0, 1]")


def as_expected(expected_grad: float | None) -> float | None:
    """expected_grad as a float."""
    expected = "a finite number > 0, or None"
    if expected_grad is None:
        return None
    check_number("expected_grad", expected_grad, math.inf, expected)
    if expected_grad == 0:
        fail("expected_grad", expected_grad, expected)
    return float(expected_grad)


def check_doubled(name: str, value: torch.Tensor, min_dims: int, layout: str) -> None:
    """The first axis holds two passes of one batch, one after the other."""
    if value.dim() < min_dims:
        fail(name, f"shape {tuple(value.shape)}", layout)
    if value.shape[0] % 2 != 0:
        fail(name, f"a first dimension of {value.shape[0]}", f"an even one: {layout}, both passes of one batch")


def check_labels(labels: object, rows: tuple[int, ...], like: torch.Tensor, floating: bool = False) -> None:
    """Integer (or floating) labels, one for each row of the first pass; rows: the doubled leading shape."""
    if not isinstance(labels, torch.Tensor):
        fail("labels", type(labels).__name__, "a torch.Tensor", TypeError)
    if not floating and labels.dtype not in INDEX_DTYPES:
        fail("labels", labels.dtype, "int32 or int64", TypeError)
    check_device("labels", labels, like)
    _check_rows("labels", labels, (rows[0] // 2, *rows[1:]))


def as_mask(mask: object, rows: tuple[int, ...], like: torch.Tensor) -> torch.Tensor | None:
    """mask as bool, of shape rows."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        fail("mask", type(mask).__name__, "a torch.Tensor or None", TypeError)
    if mask.dtype not in _MASK_DTYPES:
        fail("mask", mask.dtype, "bool, or integers 0 and 1", TypeError)
    check_device("mask", mask, like)
    _check_rows("mask", mask, rows)
    return mask if mask.dtype == torch.bool else mask != 0


def as_num_items(num_items: object, like: torch.Tensor) -> torch.Tensor | None:
    """num_items as a 0-dim tensor on like's device, whose values are never read; a number costs a fill there."""
    if num_items is None:
        return None
    if isinstance(num_items, torch.Tensor):
        if num_items.dim() != 0:
            fail("num_items", f"shape {tuple(num_items.shape)}", "an int or a 0-dim tensor")
        if num_items.dtype == torch.bool or num_items.is_complex():
            fail("num_items", num_items.dtype, "an integer or floating dtype", TypeError)
        dtype = num_items.dtype
        if dtype not in _COUNT_DTYPES:
            dtype = torch.float32 if dtype.is_floating_point else torch.int64
        if num_items.device.type == "cpu" != like.device.type and not torch.compiler.is_compiling():
            # Read on the host, which has it: a copy from unpinned memory would wait for the GPU.
            return torch.full((), num_items.item(), dtype=dtype, device=like.device)
        return num_items.detach().to(like.device, dtype)
    if not isinstance(num_items, int) or isinstance(num_items, bool):
        fail("num_items", type(num_items).__name__, "an int or a 0-dim tensor", TypeError)
    if num_items < 0:
        fail("num_items", num_items, "an int >= 0")
    return torch.full((), num_items, dtype=torch.int64, device=like.device)


def overwrites(**logits: torch.Tensor) -> bool:
    """Whether gradients take these tensors' place, once every one that requires a gradient is fit for it."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    over = {name: t for name, t in logits.items() if t.requires_grad}
    for name, t in over.items():
        root = t if t._base is None else t._base
        if root.is_leaf and root.requires_grad:
            fail(name, "a leaf that requires grad (or a view of one)", "an operation's result, since inplace=True")
        if any(step == 0 and size > 1 for step, size in zip(t.stride(), t.shape, strict=True)):
            fail(name, "a tensor whose elements share memory", "none of that, since inplace=True")
    spans = sorted((*_span(t), name) for name, t in logits.items() if t.numel())
    for (_, end, _), (begin, _, name) in pairwise(spans):
        if over and begin < end:
            fail(name, "memory that overlaps the other logits'", "memory of its own, since inplace=True")
    return bool(over)


def _span(t: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte, and of the one after the last."""
    last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _check_rows(name: str, value: torch.Tensor, rows: tuple[int, ...]) -> None:
    if value.dim() != len(rows):
        fail(name, f"shape {tuple(value.shape)}", f"shape {tuple(rows)}, one value a row")
    for got, want in zip(value.shape, rows, strict=True):
        if got != want:
            fail(name, f"shape {tuple(value.shape)}", f"shape {tuple(rows)}, one value a row")
