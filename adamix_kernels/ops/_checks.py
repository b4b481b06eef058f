"""Argument checks shared by the ops' api.py: messages name the argument, what came, what was wanted."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from .. import _environment

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


class OutOfRangeError(IndexError, ValueError):
    """An expert id or a class beyond what it counts: an index error, and a wrong value as every other bad argument."""


def fail(name: str, got: object, expected: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{name}: got {got}, expected {expected}")


def check_positive(least: int = 1, /, **sizes: object) -> None:
    """Every one is an int of at least `least`."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            fail(name, repr(value), f"an int of at least {least}")


def check_tensor(name: str, value: object, like: torch.Tensor | None = None) -> None:
    """`value` is a floating tensor; with `like`, of the same dtype and device."""
    if not isinstance(value, torch.Tensor):
        fail(name, type(value).__name__, "a torch.Tensor", TypeError)
    if value.dtype not in FLOATS:
        fail(name, value.dtype, "a floating dtype (float16, bfloat16, float32, float64)", TypeError)
    if like is not None:
        if value.dtype != like.dtype:
            fail(name, value.dtype, f"{like.dtype}, the dtype of the first argument", TypeError)
        check_device(name, value, like)


def check_device(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    if value.device != like.device:
        fail(name, f"a tensor on {value.device}", f"{like.device}, the device of the first argument")


def check_dims(name: str, value: torch.Tensor, layout: str) -> None:
    """layout: the axes in words, such as "[B, S, H]"; their number is the number of dimensions wanted."""
    if value.dim() != layout.count(",") + 1:
        fail(name, f"shape {tuple(value.shape)}", layout)


def check_shape(name: str, value: torch.Tensor, layout: str, *sizes: int) -> None:
    """Every axis of `value` has the given size."""
    check_dims(name, value, layout)
    for got, want in zip(value.shape, sizes, strict=True):
        if got != want:
            fail(name, f"shape {tuple(value.shape)}", f"{layout} = {tuple(int(s) for s in sizes)}")


def check_bank(name: str, bank: torch.Tensor, layout: str) -> None:
    """`bank` has the dimensions of layout, whose first axis counts its experts, at least one."""
    check_dims(name, bank, layout)
    if bank.shape[0] < 1:
        fail(name, f"shape {tuple(bank.shape)}", f"{layout} with at least one expert")


def check_index(name: str, index: torch.Tensor | None, num_experts: int, x: torch.Tensor) -> None:
    """A routing index is int32/int64, [B] or [B, S]; None only for a bank of one."""
    if index is None:
        if num_experts != 1:
            fail(name, "None", f"an index [B] or [B, S], since its bank holds {num_experts} experts")
        return
    if not isinstance(index, torch.Tensor):
        fail(name, type(index).__name__, "a torch.Tensor or None", TypeError)
    if index.dtype not in INDEX_DTYPES:
        fail(name, index.dtype, "int32 or int64", TypeError)
    check_device(name, index, x)
    if index.dim() not in (1, 2) or index.shape[0] != x.shape[0] or (index.dim() == 2 and index.shape[1] != x.shape[1]):
        fail(name, f"shape {tuple(index.shape)}", f"[B] or [B, S] with B, S = {tuple(x.shape[:2])}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        fail(name, repr(value), "one of " + ", ".join(map(repr, choices)))


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, int) or value not in (0, 1):
        fail(name, repr(value), "True or False", TypeError)


def check_index_values(name: str, index: torch.Tensor | None, num_experts: int) -> None:
    """Values are checked where that costs no synchronisation: on the CPU, or if ADAMIX_CHECK=1.

    Called from the op's kernel, where the values exist; api.py also runs while tracing.
    """
    if index is None or index.numel() == 0 or not values_at_hand(index):
        return
    low, high = torch.aminmax(index)
    if low < 0 or high >= num_experts:
        bad = int(low) if low < 0 else int(high)
        fail(name, f"expert id {bad}", f"0 <= id < {num_experts}, the experts in its bank", OutOfRangeError)


def values_at_hand(index: torch.Tensor) -> bool:
    """Whether the values of an index are to be read, which waits for a GPU."""
    return index.device.type == "cpu" or _environment.checks_values()


def autocast(first: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, ...]:
    """Under autocast every floating tensor takes its dtype, float64 excepted (as F.linear); None stays None."""
    tensors = (first, *others)
    dtype = autocast_dtype(first.device.type)
    if dtype is None:
        return tensors
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to; None where it is off, and on a device that has none (meta)."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
