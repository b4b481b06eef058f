"""Which forward's masks and task ids a layer computes with: its own, also where a backward runs it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .forwards import Forwards, Told, node_of_backward


class _Begun(NamedTuple):
    """task: the backward (graph task) that runs the forward; -1: none. number: of its first node."""

    task: int
    number: int
    told: Told


class Notes(Forwards[Told]):
    """Forwards of which a layer may run again, and those that a backward runs as a whole.

    The latter (reentrant checkpointing of the whole model, a hook that computes a batch anew) are told by their own
    call, and are kept apart until that backward ends: its thread may count its nodes by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._latest: _Begun | None = None
        self._under_way: _Begun | None = None
        self._within: list[_Begun] = []

    def __reduce__(self) -> Any:
        return Notes, ()

    def begin(self, told: Told, begins: bool = True) -> bool:
        """A forward of the model begins; with begins=False, none does yet. Returns whether a layer may run again."""
        begun = _Begun(torch._C._current_graph_task_id(), torch._C._autograd._get_sequence_nr(), told)
        self._under_way = begun if begins and begun.task != -1 else None
        if begun.task == -1:
            self._within.clear()
        self._latest = begun if torch.is_grad_enabled() else None
        return self._latest is not None

    def end(self) -> None:
        """It is over, or failed."""
        self._under_way = None

    def keep(self) -> None:
        """A layer of it may run again."""
        begun, self._latest = self._latest, None
        if begun is None:
            return
        if begun.task != -1:
            if all(other.task != begun.task for other in self._within):
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._drop(begun.task))
            self._within.append(begun)
        else:
            self._add(begun.number, begun.told)

    def recomputed(self) -> Told | None:
        """What the forward was told that a backward runs, or recomputes; None: neither, or it was not noted.

        Raises RuntimeError: it is no longer kept.
        """
        if self._under_way is not None or self._within:
            task = torch._C._current_graph_task_id()
            if self._under_way is not None and self._under_way.task == task:
                return self._under_way.told
            node = node_of_backward()
            for begun in reversed(self._within):
                if node is not None and begun.task != task and begun.number <= node._sequence_nr():
                    return begun.told
        return super().recomputed()

    def _drop(self, task: int) -> None:
        self._within = [begun for begun in self._within if begun.task != task]
