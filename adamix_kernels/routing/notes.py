"""Which forward's masks, task ids or samples a layer computes with: its own, also where a backward runs it."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch

from .forwards import KEPT, Forwards, T, node_of_backward


class Begun(NamedTuple):
    """task: the backward (graph task) that runs the forward; -1: none. number: of its first node."""

    task: int
    number: int
    told: Any


class Notes(Forwards[T]):
    """Forwards of which a layer may run again, and those that a backward runs as a whole.

    The latter (reentrant checkpointing of the whole model, a hook that computes a batch anew) are told by their own
    call, and are kept apart until that backward ends: its thread may count its nodes by itself.
    """

    def __init__(self, kept: int = KEPT, what: str = "the padding that its gates were told of") -> None:
        super().__init__(kept, what)
        self._latest: Begun | None = None
        self._under_way: Begun | None = None
        self._within: list[Begun] = []
        self._here: dict[int, T] = {}

    def __reduce__(self) -> Any:
        return Notes, ()

    def begin(self, told: T, begins: bool = True) -> Begun | None:
        """A forward of the model begins; with begins=False, none does yet. Returns it where a layer may run again."""
        begun = Begun(torch._C._current_graph_task_id(), torch._C._autograd._get_sequence_nr(), told)
        self._under_way = begun if begins and begun.task != -1 else None
        if begun.task == -1:
            self._within.clear()
        if begins:
            self._here[threading.get_ident()] = told
        else:
            self._here.pop(threading.get_ident(), None)
        latest = self._latest = begun if torch.is_grad_enabled() else None
        return latest

    def end(self) -> None:
        """It is over, or failed."""
        self._under_way = None
        self._here.pop(threading.get_ident(), None)

    def here(self) -> T | None:
        """What the forward under way in this thread was told; None: there is none."""
        return self._here.get(threading.get_ident())

    def keep(self, begun: Begun | None = None) -> None:
        """A layer of `begun`, by default of the latest, may run again."""
        if begun is None:
            begun, self._latest = self._latest, None
        if begun is None:
            return
        task = begun.task
        if task == -1:
            self._add(begun.number, begun.told)
            return
        if all(other.task != task for other in self._within):
            if task != torch._C._current_graph_task_id():  # that backward is over
                return
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._drop(task))
        self._within.append(begun)

    def recomputed(self) -> T | None:
        """What the forward was told that a backward runs, or recomputes; None: neither, or it was not noted.

        Raises RuntimeError: it is no longer kept.
        """
        if self._under_way is not None or self._within:
            task = torch._C._current_graph_task_id()
            if self._under_way is not None and self._under_way.task == task:
                told: T = self._under_way.told
                return told
            node = node_of_backward()
            for begun in reversed(self._within):
                if node is not None and begun.task != task and begun.number <= node._sequence_nr():
                    told = begun.told
                    return told
        return super().recomputed()

    def _drop(self, task: int) -> None:
        self._within = [begun for begun in self._within if begun.task != task]
