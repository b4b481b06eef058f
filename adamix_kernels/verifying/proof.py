"""What ADAMIX_AUTO asks for: verdicts from the store, reached now, and timed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from . import prover, table
from .machine import Job, Machine
from .timing import fastest
from .verdicts import RIGHT, Store, Verdict, known, unknown

MODES = ("off", "table", "verify", "time")
VARIABLE = "ADAMIX_AUTO"


def mode() -> str:
    """ADAMIX_AUTO; ValueError for a word that it has not."""
    found = os.environ.get(VARIABLE) or "verify"
    if found not in MODES:
        raise ValueError(f"{VARIABLE}: got {found!r}, expected one of {', '.join(MODES)}")
    return found


@dataclass(frozen=True)
class Proof:
    """Jobs -> their verdicts, as ADAMIX_AUTO says."""

    machine: Machine
    store: Store
    seconds: float
    one_case: float
    again: bool
    one_is_enough: bool
    progress: prover.Progress

    def __call__(self, wanted: Sequence[Job]) -> list[Verdict]:
        deadline = time.monotonic() + self.seconds
        left = sorted(wanted, key=lambda job: table.place(self.machine, job))
        found: list[Verdict] = []
        while left:
            now = (
                list({(job.op, job.dtype, job.shape): job for job in reversed(left)}.values())
                if self.one_is_enough
                else left
            )
            made = self._verdicts(now, max(0.0, deadline - time.monotonic()))
            found += made
            settled = {verdict.job[:1] + verdict.job[2:] for verdict in made if verdict.state == RIGHT}
            left = [job for job in left if job not in now and job[:1] + job[2:] not in settled]
        return found

    def _verdicts(self, wanted: Sequence[Job], seconds: float) -> list[Verdict]:
        how = mode()
        if how in ("verify", "time"):
            found = prover.prove(wanted, self.machine, self.store, seconds, self.one_case, self.again, self.progress)
            return list(found.values())
        old = known(self.store, list(wanted), self.machine) if how == "table" else {}
        return [old.get(job) or unknown(job, self.machine, f"{VARIABLE}={how}") for job in wanted]

    def faster(self, found: Sequence[Verdict]) -> dict[tuple[str, str, str], str]:
        """ADAMIX_AUTO=time: (op, dtype, shape class) -> the faster of what is right and the reference, which may be the
        table's choice. Processes that choose together do not time: each would find something else."""
        if mode() != "time":
            return {}
        right: dict[tuple[str, str, str], list[str]] = {}
        for verdict in found:
            if verdict.state == RIGHT:
                right.setdefault((verdict.op, verdict.dtype, verdict.shape), []).append(verdict.backend)
        firsts = table.choices(self.machine, found)
        contests = [
            Job(op, "+".join((*sorted(names), table.REFERENCE)), dtype, shape)
            for (op, dtype, shape), names in right.items()
        ]
        times = prover.times(contests, self.machine, self.store, self.seconds, self.again)
        made = {}
        for job, by_backend in times.items():
            key = job.op, job.dtype, job.shape
            made[key] = fastest(firsts[key], by_backend)
        return made
