"""What each training forward was told of its batch, for the layers that a backward runs again."""

from __future__ import annotations

from collections import deque
from typing import Generic, NamedTuple, TypeVar

import torch

# Of masks, some 100 KB each; who makes more forwards before a backward is told.
KEPT = 64

T = TypeVar("T")


class Told(NamedTuple):
    """attention_mask, decoder_mask: [B, S]. tasks: [B]. None: nothing was said."""

    attention_mask: torch.Tensor | None
    decoder_mask: torch.Tensor | None
    tasks: torch.Tensor | None


class Forwards(Generic[T]):
    """The last training forwards, by the number of the first node that autograd made in each.

    A backward that recomputes a layer is at a node of the forward it recomputes, whatever ran in between. A copy of the
    model starts without: its numbers are those of this thread.
    """

    def __init__(self, kept: int = KEPT, what: str = "the padding that its gates were told of") -> None:
        self._begun: deque[tuple[int, T]] = deque(maxlen=kept)
        self._lost, self._what = False, what

    def __reduce__(self) -> tuple[type[Forwards[T]], tuple[int, str]]:
        return Forwards, (self._begun.maxlen or KEPT, self._what)

    def _add(self, number: int, told: T) -> None:
        """Not where the forward before was told the same."""
        if self._begun and is_same(self._begun[-1][1], told):
            return
        self._lost = self._lost or len(self._begun) == self._begun.maxlen
        self._begun.append((number, told))

    def recomputed(self) -> T | None:
        """What the forward was told that is being recomputed; None where nothing is, or no forward was noted.

        Raises RuntimeError: it is no longer kept.
        """
        node = None if torch.compiler.is_compiling() or not self._begun else node_of_backward()
        if node is None:
            return None
        number = node._sequence_nr()
        found = next((entry for entry in reversed(self._begun) if entry[0] <= number), None)
        if found is None and self._lost:
            raise RuntimeError(
                f"backward: got activation checkpointing of a forward behind {self._begun.maxlen} later ones, expected "
                f"a backward after fewer: {self._what} is no longer known"
            )
        return None if found is None else found[1]

    def behind(self) -> bool:
        """Whether what is being recomputed began behind all that was noted."""
        node = node_of_backward()
        return node is not None and not (self._begun and node._sequence_nr() < self._begun[-1][0])


def is_same(old: object, new: object) -> bool:
    """Whether two forwards were told the same tensors, or the same number."""
    if isinstance(old, tuple) and isinstance(new, tuple):
        return all(a is b for a, b in zip(old, new, strict=True))
    return old == new


def node_of_backward() -> torch.autograd.graph.Node | None:
    """The node that a backward is at, in this thread."""
    node: torch.autograd.graph.Node | None = torch._C._current_autograd_node()
    return node
