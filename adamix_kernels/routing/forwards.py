"""What each training forward was told of its batch, for the layers that a backward runs again."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, NamedTuple, TypeVar

import torch

# Of masks, some 100 KB each; who makes more forwards before a backward is told.
KEPT = 64
_KEPT_SIZES = 8192  # two a forward

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

    def begin(self, told: T) -> bool:
        """A forward begins. One that a backward runs as a whole is known already. Returns whether it was noted."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or node_of_backward() is not None:
            return False
        number = torch._C._autograd._get_sequence_nr()
        if self._begun and self._begun[-1][0] == number:  # nothing ran in between
            self._begun.pop()
        self._add(number, told)
        return True

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


class Samples:
    """B of the model's forward that is under way in this thread, or that a backward recomputes.

    A copy of the model starts without.
    """

    def __init__(self) -> None:
        self._here: dict[int, int | None] = {}
        # For torch.compile, which asks for no thread and takes a tensor's size for one that changes.
        self._latest: torch.Tensor | None = None
        self._forwards: Forwards[int | None] = Forwards(_KEPT_SIZES, "of how many samples its rows are")
        self._apart = False

    def __reduce__(self) -> tuple[type[Samples], tuple[()]]:
        return Samples, ()

    def begin(self, like: torch.Tensor | None) -> None:
        """The model's forward begins with an input [B, ...]; None: nothing tells B."""
        if not torch.compiler.is_compiling():
            samples = None if like is None else like.shape[0]
            self._here[threading.get_ident()] = samples
            if self._forwards.begin(samples):
                self._apart = samples is None
        self._latest = like

    def end(self) -> None:
        """It is over, or failed: layers that run behind it are of no forward."""
        self._latest = None
        if not torch.compiler.is_compiling() and threading.get_ident() in self._here:
            del self._here[threading.get_ident()]
            self._forwards.begin(None)

    def under_way(self) -> int | None:
        """Of the forward under way; None outside of one, or where it does not tell."""
        if not torch.compiler.is_compiling() and self._here:
            return self._here.get(threading.get_ident())
        latest = self._latest
        return None if latest is None else latest.shape[0]

    def known(self) -> int | None:
        """Of the forward under way or recomputed; None: a layer's rows are as many samples.

        Raises RuntimeError: a layer is recomputed, and it is not known for which forward.
        """
        samples = self.under_way()
        if samples is not None or torch.compiler.is_compiling():
            return samples
        if node_of_backward() is None:
            self._apart = True
            return None
        samples = self._forwards.recomputed()
        if samples is None and not self._apart and self._forwards.behind():
            raise RuntimeError(
                "backward: got a layer that is recomputed for none of the model's training forwards (activation "
                "checkpointing within activation checkpointing), expected one of the two: of how many samples its "
                "rows are is not known"
            )
        return samples


def is_same(old: object, new: object) -> bool:
    """Whether two forwards were told the same tensors, or the same number."""
    if isinstance(old, tuple) and isinstance(new, tuple):
        return all(a is b for a, b in zip(old, new, strict=True))
    return old == new


def node_of_backward() -> torch.autograd.graph.Node | None:
    """The node that a backward is at, in this thread."""
    node: torch.autograd.graph.Node | None = torch._C._current_autograd_node()
    return node
