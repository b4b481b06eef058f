"""What backend="auto" takes: a table that nothing changes but `freeze`, at the moments of adamix_kernels.verifying.

Calls of ops only look it up: nothing is verified, timed or read from a disk in one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType

import torch

# By op, the classes of shapes that are verified and chosen apart, and the largest size of the first of two. Sizes: of
# routed ops Md*r or Ma*groups*r, the narrow columns of the first bank; of gated ops and the mixture the same
# of the larger bank; of losses the number of classes.
SHAPES: dict[str, tuple[str, ...]] = {
    "routed_adapter": ("narrow", "wide"),
    "routed_lora": ("narrow", "wide"),
    "gated_adapter": ("narrow", "wide"),
    "gated_lora": ("narrow", "wide"),
    "router": ("any",),
    "mixture_lora": ("narrow", "wide"),
    "merge": ("any",),
    "consistency": ("few", "many"),
}
LIMITS = {
    "routed_adapter": 256, "routed_lora": 256, "gated_adapter": 256, "gated_lora": 256, "mixture_lora": 256,
    "consistency": 4096,
}  # fmt: skip

Choice = tuple[str, torch.device, torch.dtype, str]


def shape_class(op: str, size: int) -> str:
    """The class of a call's size."""
    shapes = SHAPES[op]
    return shapes[0] if len(shapes) == 1 or size <= LIMITS[op] else shapes[1]


class Table:
    """(op, device, dtype, shape class) -> backend, for good; told from others by identity, so that it can be a key."""

    __slots__ = ("choices",)

    def __init__(self, choices: Mapping[Choice, str]):
        self.choices = MappingProxyType(dict(choices))

    def backend(self, op: str, device: torch.device, dtype: torch.dtype, size: int) -> str:
        """The backend for a call; the reference where none was chosen."""
        return self.choices.get((op, device, dtype, shape_class(op, size)), "reference")


# Replaced, never changed: a caller that holds one has one answer. Whatever keeps an answer keeps the table beside it.
table = Table({})
_one_at_a_time = threading.Lock()


def freeze(choices: Mapping[Choice, str]) -> Table:
    """From the next call on, these choices too, in place of those for the same keys; the table before."""
    global table
    with _one_at_a_time:
        before = table
        made = {**before.choices, **choices}
        if made != dict(before.choices):
            table = Table(made)
        return before


def restore(before: Table) -> None:
    """What `freeze` returned is the table again."""
    global table
    with _one_at_a_time:
        table = before
