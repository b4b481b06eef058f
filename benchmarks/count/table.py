"""The table of counts: its rows, and what may not grow in it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from .. import RESULTS
from ..measure.record import write_csv

TABLE = RESULTS / "count.csv"
# How much a count may grow before somebody has to say why.
GROWTH = 0.05


@dataclass(frozen=True)
class Row:
    """One call of an op, its launches together, as compiled for one target.

    op, backend, shape, dtype: as in the benchmarks' rows. target: 10 * compute capability. kernels: in their order.
    floor: bytes. ptx: warp instructions as PTX; sass_ratio: machine instructions for one of them; instructions: machine
    instructions of all warps; a_byte: for a byte of the floor. loaded: bytes loaded through L2, distinct: bytes that
    each launch moves at least, device: bytes to and from memory as the model has L2 (of the target's first GPU), all
    three over the floor. bank_waves: passes over shared memory's banks over the fewest. Of the launch that takes
    longest: in_flight (bytes that a multiprocessor waits for), registers, shared_bytes, blocks_an_sm, warps_an_sm,
    waves (blocks over those that run together), barriers (of a block in one step of its main loop), limit (what binds,
    by the model). v100 to b200: predicted shares of copy bandwidth, empty where the target's code does not run.
    sampled: the fewest blocks of a launch that were executed. source: fingerprint of the code. reason: why a count has
    grown.
    """

    op: str
    backend: str
    shape: str
    dtype: str
    target: int
    kernels: str
    launches: int
    floor: int
    instructions: int
    a_byte: float
    ptx: int
    sass_ratio: float
    loaded: float
    distinct: float
    device: float
    in_flight: int
    registers: int
    shared_bytes: int
    blocks_an_sm: int
    warps_an_sm: int
    waves: float
    barriers: float
    bank_waves: float
    limit: str
    v100: float | None
    a100: float | None
    h100: float | None
    h200: float | None
    b200: float | None
    sampled: int
    source: str
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.op, self.backend, self.shape, self.dtype, self.target

    @property
    def shares(self) -> dict[str, float]:
        """By the GPUs' names; those that there are."""
        found = {name.upper(): getattr(self, name) for name in SHARES}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        return f"{self.op} {self.backend} {self.shape} {self.dtype} sm_{self.target}"


COLUMNS = tuple(f.name for f in fields(Row))
SHARES = ("v100", "a100", "h100", "h200", "b200")
# What may not grow.
COUNTS = ("launches", "instructions", "loaded", "distinct", "device", "barriers", "bank_waves")
_INTEGERS = (
    "target", "launches", "floor", "instructions", "ptx", "in_flight", "registers", "shared_bytes", "blocks_an_sm",
    "warps_an_sm", "sampled",
)  # fmt: skip
_FLOATS = ("a_byte", "sass_ratio", "loaded", "distinct", "device", "waves", "barriers", "bank_waves")


def growth(old: Row, new: Row) -> list[str]:
    """The counts of `new` that are more than GROWTH above those of `old`, in words."""
    found = []
    for name in COUNTS:
        before, after = getattr(old, name), getattr(new, name)
        if after > before * (1 + GROWTH):
            found.append(f"{name} {before:g} -> {after:g}" + (f" (+{after / before - 1:.0%})" if before else ""))
    return found


def problems(committed: Sequence[Row], counted: Sequence[Row]) -> list[str]:
    """Where counting gave more than the table says, or what the table lacks. Its reasons are of the past: they explain
    what it says, not what was counted now."""
    have = {row.key: row for row in committed}
    found = []
    for row in counted:
        if row.key not in have:
            found.append(f"{row}: not in the table")
            continue
        grown = growth(have[row.key], row)
        if grown:
            found.append(f"{row}: {', '.join(grown)}")
    return found


def accepted(old: Row | None, new: Row, reason: str) -> tuple[Row, str]:
    """(the row to write, what is wrong with it): a row that has grown needs a reason, another than it had."""
    if old is None:
        return new, ""
    grown = growth(old, new)
    if not grown:
        return replace(new, reason=old.reason), ""
    if reason and reason != old.reason:
        return replace(new, reason=reason), ""
    return old, f"{new}: {', '.join(grown)}; --reason must say why, in other words than before ({old.reason!r})"


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes the rows as CSV, sorted, whole or not at all."""

    def line(row: Row) -> dict:
        rounded = {n: f"{getattr(row, n):.4g}" for n in _FLOATS}
        shares = {n: "" if getattr(row, n) is None else f"{getattr(row, n):.3f}" for n in SHARES}
        return asdict(row) | rounded | shares

    write_csv(path, COLUMNS, map(line, sorted(rows, key=lambda row: row.key)))


def committed() -> list[Row]:
    """The rows of TABLE, [] where there is none."""
    return read(TABLE) if TABLE.exists() else []


def read(path: Path) -> list[Row]:
    """The rows of a CSV that `write` made; ValueError names the columns when the header is another."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: got columns {reader.fieldnames}, expected {list(COLUMNS)}")
        return [
            Row(
                **line
                | {n: int(line[n]) for n in _INTEGERS}
                | {n: float(line[n]) for n in _FLOATS}
                | {n: float(line[n]) if line[n] else None for n in SHARES}
            )
            for line in reader
        ]
