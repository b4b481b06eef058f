"""From a launch that the executor ran, a part of its blocks or all, to what the model wants to know of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from ptx.host import Launch as Executed

from . import model
from .loops import Loop, loops
from .sass import Code, Part, anchor, in_flight, parts

# A multiprocessor by 10 * compute capability: bytes of shared memory (1 KiB a block is the driver's), warps, blocks.
MULTIPROCESSORS = {70: (98_304, 64, 32), 80: (167_936, 64, 32), 90: (233_472, 64, 32)}
# A generic load counts by the lanes whose address is in global memory.
_PLAIN = ("ld.global", "ld.generic")
_LOADS, _SECTOR = (*_PLAIN, "cp.async"), 32
_SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div.full", "div.approx")
# Sectors that come again within so many others are in L2 for certain.
_NEAR = 64


@dataclass(frozen=True)
class Counted:
    """launch: for the model. ptx: instructions of warps as PTX. least_waves: of shared
    memory's banks. registers: of a thread. barriers: of a block in one step of its longest loop. sampled: blocks that
    ran."""

    launch: model.Launch
    ptx: float
    least_waves: float
    registers: int
    shared: int
    barriers: float
    sampled: int

    @property
    def ratio(self) -> float:
        """Machine instructions for one of PTX."""
        return self.launch.instructions / max(1.0, self.ptx)


def counted(run: Executed, target: int, code: Code, dependent: bool = False) -> Counted:
    """Everything scaled from the blocks that ran to the grid."""
    names, rows = run.program.names, run.statistics
    executed = rows[:, 0].astype(float)
    blocks = math.prod(run.grid)
    scale = blocks / max(1, run.outcome.blocks)
    sources = [place(s.source) for s in run.program.kernel.statements]
    functions = {one.name: (one.first, one.last) for one in run.program.kernel.functions.values()}
    divided = parts(names, sources, ptx_loops(run), code, functions)
    spent = [part.spent(executed) for part in divided]
    is_load = np.array([name in _LOADS for name in names])
    sectors = {True: rows[is_load, 1].sum(), False: rows[[n == "st.global" for n in names], 1].sum()}
    special = executed[[name.startswith(_SPECIAL) for name in names]].sum()
    waves, least = _bank_waves(run, divided, code)
    ranges, waits = _distinct(run, scale), _waits(divided, code, run)
    launch = model.Launch(
        kernel=run.kernel.removesuffix("_kernel"),
        blocks=blocks,
        warps=run.warps,
        resident=resident(target, code.registers, run.shared, run.warps),
        instructions=sum(spent) * scale,
        special=special * scale,
        distinct=sum(moved for moved, _ in ranges.values()),
        again=[
            (count * _SECTOR * scale, 2 ** (k / 4) * _SECTOR)
            for k, count in enumerate(run.outcome.distances.tolist())
            if count and 2 ** (k / 4) >= _NEAR
        ],
        loaded=float(sectors[True]) * _SECTOR * scale,
        stored=float(sectors[False]) * _SECTOR * scale,
        bank_waves=waves * scale,
        missed=float(_missed(run).sum()) * _SECTOR * scale,
        barriers=executed[[name == "bar" for name in names]].sum() * scale / run.warps,
        waits=[(times * scale, missed) for times, missed, _ in waits],
        in_flight=sum(moved for *_, moved in waits) / sum(times * missed for times, missed, _ in waits)
        if waits
        else 0.0,
        ranges={low: held for low, (_, held) in ranges.items()},
        dependent=dependent,
    )
    longest = divided[max(range(len(divided)), key=lambda n: spent[n])]
    steps = sum(code.instructions[n].opcode == "BAR" for n in longest.sass) / longest.unrolled
    return Counted(
        launch, executed.sum() * scale, least * scale,
        code.registers, run.shared, steps, run.outcome.blocks,
    )  # fmt: skip


def place(source: str) -> str:
    """ "file.py:12" of "file.py:12:20 @[ other.py:3 ]"."""
    return ":".join(source.split(" ")[0].rsplit("/", 1)[-1].split(":")[:2])


def ptx_loops(run: Executed) -> list[Loop]:
    """The loops of the program's PTX."""
    kernel, jumps = run.program.kernel, {}
    for at, (statement, name) in enumerate(zip(kernel.statements, run.program.names)):
        guarded = statement.text.startswith("@")
        if name == "bra":
            label = statement.text.split()[-1]
            jumps[at] = [kernel.labels[label]], guarded
        elif name in ("ret", "back"):
            jumps[at] = [], guarded
    return loops(len(kernel.statements), jumps)


def resident(target: int, registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor of this target holds at once."""
    has_shared, has_warps, has_blocks = MULTIPROCESSORS[target]
    # Four register files of 16,384; a warp takes multiples of 256.
    a_warp = -(-registers * 32 // 256) * 256
    of_registers = 4 * (16_384 // max(a_warp, 256)) // warps
    return max(1, min(has_blocks, has_warps // warps, has_shared // (shared + 1024), of_registers))


def _bank_waves(run: Executed, divided: Sequence[Part], code: Code) -> tuple[float, float]:
    """Passes over the banks of shared memory, and the fewest. PTX of nvcc takes vectors apart into halves and bytes;
    where a loop's machine code has less than half of those, they are whole again, 128 bytes a pass."""
    names, rows = run.program.names, run.statistics.astype(float)
    texts = [statement.text for statement in run.program.kernel.statements]
    for part in divided:
        for kind, opcode in (("ld.shared", "LDS"), ("st.shared", "STS")):
            sizes = {n: re.search(r"\.[usb](8|16)\s", texts[n]) for n in part.ptx if names[n] == kind}
            narrow = {n: int(size[1]) // 8 for n, size in sizes.items() if size}
            left = sum(code.instructions[n].opcode == opcode and code.instructions[n].bytes < 4 for n in part.sass)
            if 2 * left < len(narrow) * part.unrolled:
                for n, size in narrow.items():
                    rows[n, 4] = rows[n, 5] = rows[n, 0] * 32 * size / 128
    return float(rows[:, 4].sum()), float(rows[:, 5].sum())


def _distinct(run: Executed, scale: float) -> dict[int, tuple[float, float]]:
    """Address of a range -> (bytes read and written, bytes that a later launch may find)."""
    found = {}
    every = run.outcome.blocks == math.prod(run.grid)
    for span, touched, firsts in zip(run.spans, run.outcome.touched, run.outcome.firsts, strict=True):
        most = (span.high - span.low) // _SECTOR + 1
        read, written = touched if every else [_of_grid(first * scale, most) for first in firsts]
        if read or written:
            found[span.low] = (float(read + written) * _SECTOR, float(max(read, written)) * _SECTOR)
    return found


def _of_grid(firsts: float, most: float) -> float:
    """Sectors of a range that the whole grid touches: as many as its blocks do, where they share none; all of them
    where they share many. In between the blocks that ran were not quite those that stand for all."""
    return firsts if firsts < 1.5 * most else most


def _missed(run: Executed) -> np.ndarray:
    """Sectors that each instruction loads past L1; cp.async does with all of them."""
    names, rows = run.program.names, run.statistics
    return np.array(
        [
            row[1] if name == "cp.async" else min(row[1], row[6]) if name in _PLAIN else 0
            for name, row in zip(names, rows.tolist())
        ]
    )


def _waits(divided: Sequence[Part], code: Code, run: Executed) -> list[tuple[float, float, float]]:
    """Of asynchronous copies, then of each part's loads: (times that the blocks that ran wait, the part of what they
    wait for that is not in L1, bytes that are not)."""
    names, rows = run.program.names, run.statistics
    copied = float(rows[[name == "cp.async" for name in names], 3].sum())
    found = [(copied / _copies(run, copied) / run.warps, 1.0, copied)] if copied else []
    missed = _missed(run)
    for part in divided:
        mine = [n for n in part.ptx if names[n] in _PLAIN and rows[n, 3]]
        moved, sectors = float(rows[mine, 3].sum()), float(rows[mine, 1].sum())
        if moved:
            share = float(missed[mine].sum()) / sectors
            opcodes = {"LDG", *(anchor(names[n]) for n in mine)}
            found.append((moved / max(32.0, _asked(divided, part, code, opcodes)) / run.warps, share, moved * share))
    return found


def _asked(divided: Sequence[Part], part: Part, code: Code, opcodes: Set[str]) -> float:
    """Bytes in flight of a part; of all parts where the assembler has put its loads into another one."""
    if any(code.instructions[n].opcode in opcodes for n in part.sass):
        return in_flight(code, part.sass, opcodes)
    return in_flight(code, sorted(n for other in divided for n in other.sass), opcodes)


def _copies(run: Executed, copied: float) -> float:
    """Bytes of a warp's asynchronous copies in flight when it waits: the mean group, times the most that may be open,
    and the one that is waited for."""
    names, executed = run.program.names, run.statistics[:, 0]
    groups = executed[[name == "cp.async.commit_group" for name in names]].sum()
    waits = [s.text for s, name in zip(run.program.kernel.statements, names) if name == "cp.async.wait_group"]
    allowed = max((int(re.search(r"(\d+)\s*$", text)[1]) for text in waits), default=0)
    return (allowed + 1) * copied / max(1, groups)
