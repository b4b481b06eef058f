"""Checks of grouped LoRA factors, shared by routed_lora and merge_lora."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ._checks import fail

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def check_number(name: str, value: float, low: float, high: float, expected: str) -> None:
    """`value` is a Python number, low <= value < high; `expected` says so in words."""
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        fail(name, repr(value), expected, TypeError)
    if not low <= value < high:
        fail(name, value, expected)


def check_scaling(scaling: float) -> None:
    """`scaling` is finite, so that an unused expert's gradient stays exactly zero."""
    # The largest double as a literal: torch.compile makes a variable of sys.float_info.max, and traces twice.
    check_number("scaling", scaling, -1.7976931348623157e308, math.inf, "a finite Python number")


def check_groups(
    lora_a: torch.Tensor, lora_b: torch.Tensor, groups: int, output_offsets: Sequence[int], width: int | None
) -> list[int]:
    """lora_a [.., groups*r, K] and lora_b [.., groups*Ng, r] fit `groups` and `output_offsets`.

    width: the number of output columns, None when it follows from the offsets. Returns the offsets.
    """
    if not isinstance(groups, int) or isinstance(groups, bool):
        fail("groups", repr(groups), "an int", TypeError)
    if groups < 1:
        fail("groups", groups, "at least 1")
    if lora_a.shape[-2] % groups:
        fail("groups", groups, f"a divisor of lora_a's {lora_a.shape[-2]} rows (groups * r)")
    if lora_b.shape[-2] % groups:
        fail("groups", groups, f"a divisor of lora_b's {lora_b.shape[-2]} rows (groups * Ng)")
    rank = lora_a.shape[-2] // groups
    if lora_b.shape[-1] != rank:
        fail("lora_b", f"shape {tuple(lora_b.shape)}", f"a last axis of r = {rank}, lora_a's rows / groups")
    return _check_offsets(output_offsets, groups, lora_b.shape[-2] // groups, width)


def _check_offsets(output_offsets: Sequence[int], groups: int, per_group: int, width: int | None) -> list[int]:
    # A tuple of types: torch.compile of torch 2.6 does not know tuple | list here.
    if not isinstance(output_offsets, (tuple, list)) or not all(isinstance(o, int) for o in output_offsets):
        fail("output_offsets", repr(output_offsets), "a tuple of ints, one for each group", TypeError)
    offsets = list(output_offsets)
    if len(offsets) != groups:
        fail("output_offsets", tuple(offsets), f"{groups} offsets, one for each group")
    for i, offset in enumerate(offsets):
        if offset < 0:
            fail("output_offsets", tuple(offsets), "offsets of at least 0")
        if width is not None and offset + per_group > width:
            fail("output_offsets", tuple(offsets), f"offset + Ng = {offset + per_group} at most {width}, the columns")
        # Pairs rather than a sorted list: while tracing with dynamic shapes the offsets may be symbols.
        if any(abs(offset - other) < per_group for other in offsets[:i]):
            fail("output_offsets", tuple(offsets), f"offsets at least Ng = {per_group} apart (no overlap)")
    return offsets
