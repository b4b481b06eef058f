"""Which kernels are preferred where: preferences.json, which `python -m benchmarks.prefer --write` makes from records.

A row holds for GPUs from its compute capability up to that of the next one. Its order ends with the reference: what
stands behind it, or not in it at all, is not taken by "auto", however right it is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .machine import Job, Machine
from .verdicts import RIGHT, Verdict

FILE = Path(__file__).parent / "preferences.json"
REFERENCE = "reference"


class Preference(NamedTuple):
    """order: backends, best first. source: where that is from, in words."""

    order: tuple[str, ...]
    source: str


@functools.cache
def _rows() -> dict[tuple[str, str, str], list[tuple[int, Preference]]]:
    made: dict[tuple[str, str, str], list[tuple[int, Preference]]] = {}
    for row in json.loads(FILE.read_text(encoding="utf-8"))["rows"]:
        preference = Preference(tuple(row["order"]), row["source"])
        made.setdefault((row["op"], row["dtype"], row["shape"]), []).append((row["capability"], preference))
    return {key: sorted(rows, key=lambda row: row[0]) for key, rows in made.items()}


def preferred(capability: int, op: str, dtype: str, shape: str) -> Preference:
    """For a GPU of 10 * compute capability."""
    rows = _rows().get((op, dtype, shape), [])
    at = [preference for least, preference in rows if least <= capability]
    return at[-1] if at else Preference((REFERENCE,), "nothing is known that speaks for a kernel here")


def choices(
    machine: Machine, verdicts: Iterable[Verdict], faster: Mapping[tuple[str, str, str], str] | None = None
) -> dict[tuple[str, str, str], str]:
    """(op, dtype, shape class) -> backend: the first in the table's order that is right here, or what timing put in
    its place (`faster`), if that is right."""
    right: dict[tuple[str, str, str], list[str]] = {}
    for verdict in verdicts:
        right.setdefault((verdict.op, verdict.dtype, verdict.shape), [])
        if verdict.state == RIGHT:
            right[verdict.op, verdict.dtype, verdict.shape].append(verdict.backend)
    made = {}
    for key, names in right.items():
        op, dtype, shape = key
        order = preferred(machine.capability, op, dtype, shape).order
        made[key] = next((name for name in order if name in names or name == REFERENCE), REFERENCE)
        timed = (faster or {}).get(key)
        if timed in names or timed == REFERENCE:
            made[key] = str(timed)
    return made


def place(machine: Machine, job: Job) -> int:
    """Where a job's backend stands in the table's order, 0 for its first choice."""
    order = preferred(machine.capability, job.op, job.dtype, job.shape).order
    return order.index(job.backend) if job.backend in order else len(order)


def jobs_of(machine: Machine, jobs: Iterable[Job]) -> list[Job]:
    """Those of a backend that the table would take here: verifying others changes nothing that "auto" does."""

    def taken(job: Job) -> bool:
        order = preferred(machine.capability, job.op, job.dtype, job.shape).order
        return place(machine, job) < order.index(REFERENCE)

    return [job for job in jobs if taken(job)]
