"""Several processes of one job: one of a node verifies for all of its GPUs' kind, and all take the same backends.

They talk through the job's own key-value store, never by a collective, and never in an op; whoever waits, waits for a
limited time, and if anybody gives up, everybody takes the reference: the first to decide decides for all.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch

from .machine import Job, Machine
from .verdicts import Verdict

# Seconds for the slowest process to arrive where all verify: models load unevenly fast.
ARRIVE = 120.0
AGREED, GAVE_UP = b"agreed", b"gave up"
Choices = Mapping[tuple[str, str, str], str]
_meetings, _over = 0, False


class Ranks:
    """The processes that meet once. store: torch.distributed's; place: of this process."""

    def __init__(self, store: Any, rank: int, size: int, place: str, name: str, arrive: float = ARRIVE):
        self.rank, self.size, self._place, self._arrive = rank, size, place, arrive
        self._store, self._name = store, name

    def verdicts(
        self, machine: Machine, jobs: Sequence[Job], seconds: float, prove: Callable[[list[Job]], list[Verdict]]
    ) -> list[Verdict] | None:
        """What the first process of those with this kind of GPU on this node has found out by `prove`, for the jobs of
        all of them; None: somebody did not come or did not answer, and all take the reference."""
        mine = {"place": f"{self._place} {machine.name}", "jobs": [list(job) for job in jobs]}
        self._set(f"here/{self.rank}", mine)
        others = self._all("here", self._arrive)
        if others is None:
            return None
        alike = [rank for rank, other in enumerate(others) if other["place"] == mine["place"]]
        if alike[0] == self.rank:
            wanted = dict.fromkeys(Job(*fields) for rank in alike for fields in others[rank]["jobs"])
            found = prove(list(wanted))
            self._set(f"verdicts/{self.rank}", [asdict(verdict) for verdict in found])
            return found
        answer = self._get(f"verdicts/{alike[0]}", seconds + self._arrive)
        return None if answer is None else [Verdict(**fields) for fields in answer]

    def agree(self, choices: Choices, seconds: float) -> Choices:
        """The choices that every process has made alike; the reference for the others."""
        self._set(f"choices/{self.rank}", [[*key, name] for key, name in choices.items()])
        everybody = self._all("choices", seconds + 2 * self._arrive)
        decision = self._decide(GAVE_UP if everybody is None else AGREED)
        if decision == AGREED and everybody is None:
            # Late by a moment: who decided has seen the choices of all.
            everybody = self._all("choices", self._arrive)
        if decision == GAVE_UP or everybody is None:
            self.give_up()
            return {key: "reference" for key in choices}
        first, *rest = ({tuple(row[:3]): row[3] for row in one} for one in everybody)
        return {
            key: name if all(o.get(key) == name for o in (first, *rest)) else "reference"
            for key, name in choices.items()
        }

    def give_up(self) -> None:
        """Nobody may take a kernel now, and nobody meets again: who did not come would be one meeting behind."""
        global _over
        _over = True
        self._decide(GAVE_UP)

    def _decide(self, word: bytes) -> bytes:
        decision: bytes = self._store.compare_set(f"{self._name}/decision", "", word.decode())
        return decision

    def _set(self, name: str, value: Any) -> None:
        self._store.set(f"{self._name}/{name}", json.dumps(value))

    def _get(self, name: str, seconds: float) -> Any:
        try:
            self._store.wait([f"{self._name}/{name}"], timedelta(seconds=seconds))
        except (RuntimeError, ValueError):  # torch's DistStoreError is a RuntimeError: nobody answered
            return None
        return json.loads(self._store.get(f"{self._name}/{name}"))

    def _all(self, name: str, seconds: float) -> list[Any] | None:
        try:
            self._store.wait([f"{self._name}/{name}/{rank}" for rank in range(self.size)], timedelta(seconds=seconds))
        except (RuntimeError, ValueError):
            return None
        return [json.loads(self._store.get(f"{self._name}/{name}/{rank}")) for rank in range(self.size)]


def met() -> Ranks | None:
    """The processes of the group that this one belongs to; None where it is alone.

    Raises RuntimeError in one of several launched processes that has no group yet, or after they gave up.
    """
    global _meetings
    if _over:
        raise RuntimeError("other processes of this job have not come to verify, or not answered")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        if size == 1:
            return None
        _meetings += 1
        store = torch.distributed.distributed_c10d._get_default_store()
        name = f"adamix_kernels/{_meetings}"
        return Ranks(store, torch.distributed.get_rank(), size, socket.gethostname(), name)
    if int(os.environ.get("WORLD_SIZE") or "1") > 1:
        raise RuntimeError(
            "this is one of several launched processes, which cannot agree before torch.distributed."
            "init_process_group; AdaMixTrainer, or adamix_kernels.verify() after it, does"
        )
    return None
