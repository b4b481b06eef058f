"""What the assembler makes of PTX: registers, and machine instructions for every one that was executed as PTX."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What the assembler neither adds nor leaves out, as a rule: PTX -> machine code, by the first word or two.
ANCHORS = {
    "ld.global": "LDG", "st.global": "STG", "cp.async": "LDGSTS", "ex2": "MUFU", "lg2": "MUFU", "rcp": "MUFU",
    "mma": "HMMA", "wgmma": "HGMMA", "ldmatrix": "LDSM", "atom": "ATOM",
}  # fmt: skip
_LINE = re.compile(r'//## File "([^"]+)", line (\d+)(?P<inlined> inlined at)?')
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Instruction:
    """words: the operands. source: "file.py:12"."""

    name: str
    words: str
    source: str

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bytes(self) -> int:
        """That one lane loads or stores."""
        return next((_WIDTHS[part] for part in self.name.split(".") if part in _WIDTHS), 4)


@dataclass(frozen=True)
class Code:
    """registers: of a thread. instructions: of the kernel, in order. labels: name -> the instruction after it."""

    registers: int
    instructions: list[Instruction]
    labels: dict[str, int]


@dataclass(frozen=True)
class Loop:
    """Instructions first to last, both in it; own: those in no loop inside it."""

    first: int
    last: int
    own: tuple[int, ...]


def assembled(ptx: str, arch: str, ptxas: str, nvdisasm: str) -> Code:
    """The machine code of a PTX text with one kernel, for "sm_90a" or the like."""
    with tempfile.TemporaryDirectory(prefix="adamix-count-") as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [ptxas, "-v", "-lineinfo", f"--gpu-name={arch}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        text = subprocess.run([nvdisasm, "-c", "-g", str(cubin)], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"Used (\d+) registers", done.stdout + done.stderr)
    if registers is None:
        raise ValueError(f"ptxas: got {done.stderr!r}, expected the number of registers")
    return parsed(text, int(registers[1]))


def parsed(text: str, registers: int) -> Code:
    """The kernel in what nvdisasm -c -g prints."""
    found: list[Instruction] = []
    labels, source = {}, ""
    for line in text.splitlines():
        where = _LINE.search(line)
        if where and not where["inlined"]:
            source = f"{where[1].rsplit('/', 1)[-1]}:{where[2]}"
        elif match := _LABEL.match(line):
            labels[match[1]] = len(found)
        elif (match := _INSTRUCTION.match(line)) and match[2] != "NOP":
            found.append(Instruction(match[2], match[3], source))
    # An endless branch to itself fills the end.
    while found and found[-1].opcode == "BRA" and labels.get(_target(found[-1])) == len(found) - 1:
        found.pop()
    return Code(registers, found, {name: at for name, at in labels.items() if at < len(found)})


def _target(instruction: Instruction) -> str:
    named = re.search(r"\.L_\w+", instruction.words)
    return named[0] if named else ""


def loops(count: int, branches: Sequence[tuple[int, int]]) -> list[Loop]:
    """Of `count` instructions; branches: (from, to). A loop ends with its last branch back to its first instruction."""
    ends: dict[int, int] = {}
    for at, to in branches:
        if to <= at:
            ends[to] = max(at, ends.get(to, 0))
    spans = sorted(ends.items())
    made = []
    for first, last in spans:
        inside = [(f, e) for f, e in spans if (f, e) != (first, last) and first <= f and e <= last]
        own = tuple(n for n in range(first, last + 1) if not any(f <= n <= e for f, e in inside))
        made.append(Loop(first, last, own))
    return made


def sass_loops(code: Code) -> list[Loop]:
    """The loops of the machine code."""
    branches = [
        (at, code.labels[_target(one)])
        for at, one in enumerate(code.instructions)
        if one.opcode in ("BRA", "BRX") and _target(one) in code.labels
    ]
    return loops(len(code.instructions), branches)


@dataclass(frozen=True)
class Part:
    """A loop's own instructions, or (the first) those in no loop: as PTX and as machine code; unrolled: iterations of
    the one in one of the other."""

    ptx: tuple[int, ...]
    sass: tuple[int, ...]
    unrolled: int

    @property
    def ratio(self) -> float:
        """Machine instructions for one of PTX."""
        return min(4.0, len(self.sass) / self.unrolled / len(self.ptx)) if self.ptx else 0.0


def parts(names: Sequence[str], sources: Sequence[str], ptx_loops: Sequence[Loop], code: Code) -> list[Part]:
    """Loops of the PTX (its instructions' names and sources) beside those of the machine code, in the same order."""
    theirs = sass_loops(code)
    ours = [(_anchors(names, loop), {sources[n] for n in _span(loop)}) for loop in ptx_loops]
    opcodes = [one.opcode for one in code.instructions]
    made = [(_counted(opcodes, loop), {code.instructions[n].source for n in _span(loop)}) for loop in theirs]
    pairs = _aligned([[_alike(a, b) for b in made] for a in ours])
    taken_ptx = {n for p, _ in pairs for n in ptx_loops[p].own}
    # A loop of the machine code without a partner is what is left of an unrolled one: it runs a few times at most.
    taken_sass = {n for loop in theirs for n in loop.own}
    found = [
        Part(
            tuple(n for n in range(len(names)) if n not in taken_ptx),
            tuple(n for n in range(len(opcodes)) if n not in taken_sass),
            1,
        )
    ]
    for p, s in pairs:
        mine, its = ptx_loops[p], theirs[s]
        have = sum(_anchors(names, mine, own=True).values())
        unrolled = round(sum(_counted(opcodes, its, own=True).values()) / have) if have else 1
        found.append(Part(mine.own, its.own, max(1, unrolled)))
    return found


def _span(loop: Loop) -> range:
    return range(loop.first, loop.last + 1)


def _anchors(names: Sequence[str], loop: Loop, own: bool = False) -> Counter[str]:
    kinds = (anchor(names[n]) for n in (loop.own if own else _span(loop)))
    return Counter(kind for kind in kinds if kind)


def anchor(name: str) -> str:
    """The machine instruction of a PTX one, "" where there may be another number of them."""
    return next((kind for prefix, kind in ANCHORS.items() if name == prefix or name.startswith(f"{prefix}.")), "")


def _counted(opcodes: Sequence[str], loop: Loop, own: bool = False) -> Counter[str]:
    kinds = set(ANCHORS.values())
    return Counter(opcodes[n] for n in (loop.own if own else _span(loop)) if opcodes[n] in kinds)


def _alike(a: tuple[Counter[str], set[str]], b: tuple[Counter[str], set[str]]) -> float:
    """0 to 1: the mix of anchors, and the lines of the source."""
    (x, lines_x), (y, lines_y) = a, b
    dot = sum(x[kind] * y[kind] for kind in x)
    norm = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
    mix = dot / norm if norm else float(not x and not y)
    return 0.5 * mix + 0.5 * len(lines_x & lines_y) / max(1, len(lines_x | lines_y))


def _aligned(score: Sequence[Sequence[float]], least: float = 0.35) -> list[tuple[int, int]]:
    """Pairs (row, column), both rising, with the largest sum; none below `least`."""
    rows, columns = len(score), len(score[0]) if score else 0
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows - 1, -1, -1):
        for j in range(columns - 1, -1, -1):
            paired = best[i + 1][j + 1] + score[i][j] if score[i][j] >= least else 0.0
            best[i][j] = max(best[i + 1][j], best[i][j + 1], paired)
    found, i, j = [], 0, 0
    while i < rows and j < columns:
        if score[i][j] >= least and best[i][j] == best[i + 1][j + 1] + score[i][j]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return found


def in_flight(code: Code, numbers: Sequence[int]) -> float:
    """Bytes that a warp asks of global memory before it waits, on average, in these instructions of one loop or none.

    A register that is loaded is waited for where it is used first; asynchronous copies where a group must have come.
    """
    waits, asked = [], 0
    pending: set[int] = set()
    groups, open_group, width, copied = 0, 0, 0, 0.0
    for n in (*numbers, *numbers):
        one = code.instructions[n]
        registers = [int(r) for r in re.findall(r"\bR(\d+)\b", one.words)]
        if pending.intersection(registers):
            waits.append(asked)
            asked, pending = 0, set()
        if one.opcode == "LDG" and registers:
            asked += 32 * one.bytes
            first = registers[0]
            pending |= set(range(first, first + max(1, one.bytes // 4)))
        elif one.opcode == "LDGSTS":
            open_group += 32 * one.bytes
        elif one.opcode == "LDGDEPBAR" and open_group:
            width, groups, open_group = max(width, open_group), groups + 1, 0
        elif one.opcode == "DEPBAR" and width:
            allowed = int((re.search(r"0x([0-9a-f]+)", one.words) or ["0", "0"])[1], 16)
            copied = max(copied, (allowed + 1.0) * width)
    loads = sum(waits) / len(waits) if waits else float(asked)
    return max(loads, copied) if copied else loads
