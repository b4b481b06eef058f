"""The table of ahead-of-time compilations: its rows, and what may not stand in it."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from .. import RESULTS
from ..measure.record import write_csv

TABLE = RESULTS / "aot.csv"
# 10 * compute capability -> bytes of shared memory that one block may ask for.
SHARED_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
# 32-bit registers of a multiprocessor, which a block can have all of.
REGISTERS = 65_536
# Registers of a thread that may be spilled (160 bytes, which stay in L1): a few cost less than the blocks on a
# multiprocessor that a smaller tile or a higher limit of registers would.
SPILLS = 40
# Those that hold all experts' columns twice, in float32 or 256 of them; smaller tiles than theirs there are none.
_MAY_SPILL = {"gated_adapter_input_grad_kernel": 192, "gated_adapter_weight_grad_kernel": 144}
# Of one expert's 256 columns in float32, which a tile cannot take apart.
_MAY_SPILL |= dict.fromkeys(("gated_adapter_rows_shrink_kernel", "gated_adapter_rows_weight_grad_kernel"), 96)


class Multiprocessor(NamedTuple):
    """What a multiprocessor has besides its registers; shared: bytes, of which the driver takes 1 KiB a block."""

    shared: int
    warps: int
    blocks: int


MULTIPROCESSORS = {
    80: Multiprocessor(167_936, 64, 32),
    90: Multiprocessor(233_472, 64, 32),
    100: Multiprocessor(233_472, 64, 32),
    120: Multiprocessor(102_400, 48, 24),
}
# Columns of tensor memory in a multiprocessor of compute capability 10.0.
TENSOR_COLUMNS = 512


@dataclass(frozen=True)
class Row:
    """One kernel, compiled for one GPU.

    case: routing, experts and rank it was compiled for. config: rows x columns of a tile, warps, stages.
    spills: 32-bit registers kept in local memory, for each thread. mma: the matrix instructions of its
    dots, "fma" among them where a dot uses none, "" without a dot. source: of the kernel and its constants.
    The figures are None before it is compiled.
    """

    kernel: str
    dtype: str
    case: str
    config: str
    target: int
    registers: int | None
    spills: int | None
    shared_bytes: int | None
    tensor_columns: int | None
    mma: str
    source: str
    triton: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.kernel, self.dtype, self.case, self.target

    @property
    def warps(self) -> int:
        return int(self.config.partition(" w")[2].partition(" ")[0])

    @property
    def block_registers(self) -> int:
        """What one block takes of REGISTERS: a thread's, rounded up to 8."""
        return -(-(self.registers or 0) // 8) * 8 * 32 * self.warps

    @property
    def resident(self) -> int:
        """Blocks that one multiprocessor holds at once."""
        has = MULTIPROCESSORS[self.target]
        limits = [has.blocks, has.warps // self.warps, has.shared // ((self.shared_bytes or 0) + 1024)]
        if self.registers:
            limits.append(REGISTERS // self.block_registers)
        if self.tensor_columns:
            limits.append(TENSOR_COLUMNS // self.tensor_columns)
        return min(limits)

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} {self.case} ({self.config}) on sm_{self.target}"


COLUMNS = tuple(f.name for f in fields(Row))
_FIGURES = ("registers", "spills", "shared_bytes", "tensor_columns", "mma")
_NUMBERS = ("target", *_FIGURES[:-1])


def problems(rows: Iterable[Row]) -> list[str]:
    """What no shipped configuration may show: many spills, too many registers or bytes, 16-bit dots by scalars."""
    found = []
    for row in rows:
        spills = _MAY_SPILL.get(row.kernel, SPILLS)
        if row.spills > spills:
            found.append(f"{row}: {row.spills} spilled registers, {spills} at most")
        if row.shared_bytes > SHARED_LIMITS[row.target]:
            found.append(f"{row}: {row.shared_bytes} B shared memory, {SHARED_LIMITS[row.target]} at most")
        if row.block_registers > REGISTERS:
            found.append(f"{row}: {row.block_registers} registers a block, {REGISTERS} at most: no GPU launches it")
        if row.tensor_columns > TENSOR_COLUMNS:
            found.append(f"{row}: {row.tensor_columns} columns of tensor memory, {TENSOR_COLUMNS} at most")
        if "fma" in row.mma and row.dtype != "float32":
            found.append(f"{row}: a dot without a tensor-core instruction ({row.mma})")
    return found


def spilled(rows: Iterable[Row]) -> list[str]:
    """Those that spill at all: told, not refused."""
    return [f"{row}: {row.spills} of {row.registers} registers are spilled" for row in rows if row.spills]


def crowded(rows: Iterable[Row], counted_on: Mapping[tuple[str, str, str, int], int]) -> list[str]:
    """Where fewer blocks fit on a multiprocessor than the kernel's plan counts on; counted_on: by a row's key."""
    return [
        f"{row}: {row.resident} blocks on a multiprocessor, the plan counts on {counted_on[row.key]}"
        for row in rows
        if row.resident < counted_on.get(row.key, 1)
    ]


def mismatches(committed: Sequence[Row], wanted: Sequence[Row]) -> list[str]:
    """Where the table and the cases part: a row without its case, a case without its row, other sources or blocks.

    Sources are compared whatever the triton version.
    """
    twice = [f"{key}: two rows" for key, count in Counter(row.key for row in committed).items() if count > 1]
    have, want = {row.key: row for row in committed}, {row.key: row for row in wanted}
    found = [f"{row}: no such case any more" for key, row in have.items() if key not in want]
    found += [f"{row}: not in the table" for key, row in want.items() if key not in have]
    for key in have.keys() & want.keys():
        if have[key].config != want[key].config:
            found.append(f"{want[key]}: the table has {have[key].config}")
        elif have[key].source != want[key].source:
            found.append(f"{want[key]}: its source has changed")
    return twice + sorted(found)


def differences(committed: Sequence[Row], compiled: Sequence[Row]) -> list[str]:
    """Figures that compiling again gave otherwise; only rows of the same triton version are compared."""
    have = {row.key: row for row in committed}
    found = []
    for row in compiled:
        old = have.get(row.key)
        if old is None or old.triton != row.triton:
            continue
        found += [
            f"{row}: {name} {getattr(row, name)}, the table has {getattr(old, name)}"
            for name in _FIGURES
            if getattr(row, name) != getattr(old, name)
        ]
    return found


def unchanged(row: Row, old: Row | None) -> bool:
    """Whether compiling `row` would give the figures of `old`: the same source, blocks and compiler."""
    return old is not None and (old.source, old.config, old.triton) == (row.source, row.config, row.triton)


def hardest(rows: Iterable[Row], number: int | None = None) -> list[Row]:
    """One row for each kernel, size of its dtype, and target: that with the most registers, then shared memory. Of all
    these `number`, those with the most."""
    chosen: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda r: (-(r.registers or 0), -(r.shared_bytes or 0), r.key)):
        chosen.setdefault((row.kernel, row.dtype == "float32", row.target), row)
    return sorted(list(chosen.values())[:number], key=lambda r: r.key)


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows as CSV, whole or not at all."""
    write_csv(path, COLUMNS, map(asdict, rows))


def read(path: Path) -> list[Row]:
    """The rows of a CSV that `write` made; ValueError names the columns when the header is another."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: got columns {reader.fieldnames}, expected {list(COLUMNS)}")
        return [Row(**line | {n: int(line[n]) if line[n] else None for n in _NUMBERS}) for line in reader]
