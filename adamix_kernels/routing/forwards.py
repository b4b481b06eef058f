"""What each training forward was told of its batch, for the layers that a backward runs again."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch

# Of masks, some 100 KB each; who makes more forwards before a backward is told.
KEPT = 64


class Told(NamedTuple):
    """attention_mask, decoder_mask: [B, S]. tasks: [B]. None: nothing was said."""

    attention_mask: torch.Tensor | None
    decoder_mask: torch.Tensor | None
    tasks: torch.Tensor | None


class Forwards:
    """The last training forwards, by the number of the first node that autograd made in each.

    A backward that recomputes a layer is at a node of the forward it recomputes, whatever ran in between. A copy of the
    model starts without: its numbers are those of this thread.
    """

    def __init__(self) -> None:
        self._begun: deque[tuple[int, Told]] = deque(maxlen=KEPT)
        self._lost = False

    def __reduce__(self) -> tuple[type[Forwards], tuple[()]]:
        return Forwards, ()

    def begin(self, told: Told) -> None:
        """A forward begins. One that a backward runs as a whole is known already."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _node() is not None:
            return
        number = torch._C._autograd._get_sequence_nr()
        if self._begun and self._begun[-1][0] == number:  # nothing ran in between
            self._begun.pop()
        if self._begun and all(a is b for a, b in zip(self._begun[-1][1], told, strict=True)):
            return
        self._lost = self._lost or len(self._begun) == KEPT
        self._begun.append((number, told))

    def recomputed(self) -> Told | None:
        """What the forward was told that is being recomputed; None where nothing is, or no forward was noted.

        Raises RuntimeError: more than KEPT forwards ago.
        """
        node = None if torch.compiler.is_compiling() or not self._begun else _node()
        if node is None:
            return None
        number = node._sequence_nr()
        found = next((told for first, told in reversed(self._begun) if first <= number), None)
        if found is None and self._lost:
            raise RuntimeError(
                f"backward: got activation checkpointing of a forward behind {KEPT} later ones, expected a backward "
                "after fewer: the padding that its gates were told of is no longer known"
            )
        return found


def _node() -> torch.autograd.graph.Node | None:
    """The node that a backward is at, in this thread."""
    node: torch.autograd.graph.Node | None = torch._C._current_autograd_node()
    return node
