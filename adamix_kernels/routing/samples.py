"""Of how many samples the rows of a layer are."""

from __future__ import annotations

import threading

import torch

from .forwards import node_of_backward
from .notes import Notes

_KEPT = 8192  # two a forward


class Samples:
    """B of the model's forward that is under way in this thread, or that a backward recomputes.

    A copy of the model starts without.
    """

    def __init__(self) -> None:
        # With the backward (graph task) that runs the forward; -1: none.
        self._here: dict[int, tuple[int | None, int]] = {}
        # For torch.compile, which asks for no thread and takes a tensor's size for one that changes.
        self._latest: torch.Tensor | None = None
        self._forwards: Notes[int | None] = Notes(_KEPT, "of how many samples its rows are")
        self._apart = False

    def __reduce__(self) -> tuple[type[Samples], tuple[()]]:
        return Samples, ()

    def begin(self, like: torch.Tensor | None) -> None:
        """The model's forward begins with an input [B, ...]; None: nothing tells B."""
        if not torch.compiler.is_compiling():
            samples = None if like is None else like.shape[0]
            self._here[threading.get_ident()] = samples, torch._C._current_graph_task_id()
            begun = self._forwards.begin(samples)
            if begun is not None:
                self._forwards.keep(begun)
                if begun.task == -1:
                    self._apart = samples is None
        self._latest = like

    def end(self) -> None:
        """It is over, or failed: layers that run behind it are of no forward."""
        self._latest = None
        if not torch.compiler.is_compiling() and self._here.pop(threading.get_ident(), None) is not None:
            begun = self._forwards.begin(None, begins=False)
            if begun is not None and begun.task == -1:
                self._forwards.keep(begun)

    def under_way(self) -> int | None:
        """Of the forward under way; None outside of one, in a backward within it, or where it does not tell."""
        if not torch.compiler.is_compiling() and self._here:
            samples, task = self._here.get(threading.get_ident(), (None, -1))
            return samples if task == torch._C._current_graph_task_id() else None
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
                "backward: got a layer that is recomputed for none of the model's training forwards, expected one of "
                "them: of how many samples its rows are is not known"
            )
        return samples
