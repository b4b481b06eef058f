"""From a launch that the executor ran, a part of its blocks or all, to what the model wants to know of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptx.host import Launch as Executed

from . import count_model as model
from .count_sass import Code, Loop, Part, in_flight, loops, parts

# A multiprocessor by 10 * compute capability: bytes of shared memory (1 KiB a block is the driver's), warps, blocks.
MULTIPROCESSORS = {70: (98_304, 64, 32), 80: (167_936, 64, 32), 90: (233_472, 64, 32)}
_LOADS, _SECTOR = ("ld.global", "cp.async"), 32
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


def counted(run: Executed, target: int, code: Code) -> Counted:
    """Everything scaled from the blocks that ran to the grid."""
    names, rows = run.program.names, run.statistics
    executed = rows[:, 0].astype(float)
    blocks = math.prod(run.grid)
    scale = blocks / max(1, run.outcome.blocks)
    divided = parts(names, [place(s.source) for s in run.program.kernel.statements], ptx_loops(run), code)
    spent = [part.ratio * executed[list(part.ptx)].sum() for part in divided]
    is_load = np.array([name in _LOADS for name in names])
    sectors = {True: rows[is_load, 1].sum(), False: rows[[n == "st.global" for n in names], 1].sum()}
    special = executed[[name.startswith(_SPECIAL) for name in names]].sum()
    ranges = _distinct(run, scale)
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
        bank_waves=float(rows[:, 4].sum()) * scale,
        asked=float((rows[:, 3] * is_load).sum()) * scale,
        in_flight=run.warps * _in_flight(divided, code, rows[:, 3] * is_load),
        ranges={low: held for low, (_, held) in ranges.items()},
    )
    longest = divided[max(range(len(divided)), key=lambda n: spent[n])]
    steps = sum(code.instructions[n].opcode == "BAR" for n in longest.sass) / longest.unrolled
    return Counted(
        launch, executed.sum() * scale, float(rows[:, 5].sum()) * scale,
        code.registers, run.shared, steps, run.outcome.blocks,
    )  # fmt: skip


def place(source: str) -> str:
    """ "file.py:12" of "file.py:12:20 @[ other.py:3 ]"."""
    return ":".join(source.split(" ")[0].rsplit("/", 1)[-1].split(":")[:2])


def ptx_loops(run: Executed) -> list[Loop]:
    """The loops of the program's PTX."""
    kernel = run.program.kernel
    branches = []
    for at, statement in enumerate(kernel.statements):
        named = re.search(r"\bbra(?:\.uni)?\s+([$\w]+)", statement.text)
        if named and named[1] in kernel.labels:
            branches.append((at, kernel.labels[named[1]]))
    return loops(len(kernel.statements), branches)


def resident(target: int, registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor of this target holds at once."""
    has_shared, has_warps, has_blocks = MULTIPROCESSORS[target]
    # Four register files of 16,384; a warp takes multiples of 256.
    a_warp = -(-registers * 32 // 256) * 256
    of_registers = 4 * (16_384 // max(a_warp, 256)) // warps
    return max(1, min(has_blocks, has_warps // warps, has_shared // (shared + 1024), of_registers))


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
    """Sectors of a range that the whole grid touches: as many as its blocks do, where they share none; all of them where
    they share many. In between the blocks that ran were not quite those that stand for all."""
    return firsts if firsts < 1.5 * most else most


def _in_flight(divided: Sequence[Part], code: Code, loaded: np.ndarray) -> float:
    """Of a warp, the mean over the time that its loads take; 0 without any."""
    waits = 0.0
    for part in divided:
        moved = float(loaded[list(part.ptx)].sum())
        if moved:
            waits += moved / max(32.0, in_flight(code, part.sass))
    return float(loaded.sum()) / waits if waits else 0.0
