"""What the assembler makes of PTX: registers, and machine instructions for every one that was executed as PTX."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from .loops import Jump, Loop, loops, reachable

# What the assembler neither adds nor leaves out, as a rule: PTX -> machine code, by the first word or two.
ANCHORS = {
    "ld.global": "LDG", "ld.generic": "LD", "st.global": "STG", "cp.async": "LDGSTS", "ex2": "EX2", "lg2": "LG2",
    "mma": "HMMA", "wgmma": "HGMMA", "ldmatrix": "LDSM", "atom": "ATOMG",
}  # fmt: skip
# What waits for those above, or tells where they end, is no anchor.
_GROUPS = ("cp.async.", "wgmma.")
# Of wmma's 16 x 16 x 16, by the shape of the HMMA: how many make a product, and how many LDSM an operand in float16.
_WMMA = {"884": (16, 0), "1688": (4, 2), "16816": (2, 1)}
_LINE = re.compile(r'//## File "([^"]+)", line (\d+)(?P<inlined> inlined at)?')
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_FUNCTION = re.compile(r"^\$\S*\$(\w+):")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Instruction:
    """words: the operands. source: "file.py:12". guarded: whether a predicate decides if it runs."""

    name: str
    words: str
    source: str
    guarded: bool = False

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def kind(self) -> str:
        """As in ANCHORS. Divisions, of integers too, have a MUFU.RCP of their own; EX2 and LG2 are asked for."""
        return self.name.split(".")[1] if self.opcode == "MUFU" and "." in self.name else self.opcode

    @property
    def bytes(self) -> int:
        """That one lane loads or stores."""
        return next((_WIDTHS[part] for part in self.name.split(".") if part in _WIDTHS), 4)


@dataclass(frozen=True)
class Code:
    """registers: of a thread. instructions: of the kernel, in order. labels: name -> the instruction after it.
    functions: what is called, name -> its first instruction and the one behind it."""

    registers: int
    instructions: list[Instruction]
    labels: dict[str, int]
    functions: dict[str, tuple[int, int]]


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
    labels, firsts, source = {}, {}, ""
    for line in text.splitlines():
        where = _LINE.search(line)
        if where and not where["inlined"]:
            source = f"{where[1].rsplit('/', 1)[-1]}:{where[2]}"
        elif match := _LABEL.match(line):
            labels[match[1]] = len(found)
        elif match := _FUNCTION.match(line):
            firsts[match[1]] = len(found)
        elif (match := _INSTRUCTION.match(line)) and match[2] != "NOP":
            found.append(Instruction(match[2], match[3], source, bool(match[1])))
    # An endless branch to itself fills the end.
    while found and found[-1].opcode == "BRA" and labels.get(_target(found[-1])) == len(found) - 1:
        found.pop()
    functions = dict(zip(firsts, zip(firsts.values(), [*list(firsts.values())[1:], len(found)])))
    return Code(registers, found, {name: at for name, at in labels.items() if at < len(found)}, functions)


def _target(instruction: Instruction) -> str:
    named = re.search(r"\.L_\w+", instruction.words)
    return named[0] if named else ""


def _jumps(code: Code) -> dict[int, Jump]:
    """Those of the machine code. BRA.DIV leads to what a shuffle of a diverged warp does, which no kernel here has; a
    CALL of a label, not of a function, never comes back: so ptxas leaves a loop."""
    jumps: dict[int, Jump] = {}
    for at, one in enumerate(code.instructions):
        if one.name.startswith("BRA.DIV"):
            continue
        if one.opcode in ("BRA", "BRX", "CALL") and _target(one) in code.labels:
            # "BRA P0, `(.L_x_1)" asks as "@P0 BRA `(.L_x_1)" does.
            jumps[at] = [code.labels[_target(one)]], one.guarded or not one.words.lstrip().startswith("`")
        elif one.opcode in ("EXIT", "RET", "BRX"):
            jumps[at] = [], one.guarded
    return jumps


def sass_loops(code: Code) -> list[Loop]:
    """The loops of the machine code."""
    return loops(len(code.instructions), _jumps(code))


@dataclass(frozen=True)
class Part:
    """A loop's own instructions, a function's, or (the first) those in neither: as PTX and as machine code; unrolled:
    iterations of the one in one of the other; products: those of PTX that are many of machine code -> how many."""

    ptx: tuple[int, ...]
    sass: tuple[int, ...]
    unrolled: int
    products: Mapping[int, int] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Machine instructions for one of PTX, products left out of both."""
        left, of = len(self.sass) / self.unrolled - sum(self.products.values()), len(self.ptx) - len(self.products)
        return min(4.0, max(0.0, left) / of) if of else 0.0

    def spent(self, executed: Sequence[float]) -> float:
        """Machine instructions, where each of the PTX's runs so many times. Branches that are not taken make products
        a larger part of what runs than of what is written."""
        products = sum(times * executed[n] for n, times in self.products.items())
        return products + self.ratio * sum(executed[n] for n in self.ptx if n not in self.products)


class _Looks(NamedTuple):
    """What tells one loop from another: anchors, instructions (as many as machine code has), lines of the source."""

    mix: Counter[str]
    size: float
    lines: set[str]


def parts(
    names: Sequence[str],
    sources: Sequence[str],
    ptx_loops: Sequence[Loop],
    code: Code,
    functions: Mapping[str, tuple[int, int]] | None = None,
) -> list[Part]:
    """Loops of the PTX (its instructions' names and sources) beside those of the machine code that are most alike; and
    its functions, as Code.functions."""
    theirs, made_of = sass_loops(code), _wmma(code)
    # Of two loops that differ in little the one with fewer instructions would else take the other's machine code.
    scale = len(code.instructions) / max(1, len(names))
    ours = [
        _Looks(_anchors(names, loop.body, made_of), scale * len(loop.body), {sources[n] for n in loop.body})
        for loop in ptx_loops
    ]
    kinds = [one.kind for one in code.instructions]
    made = [
        _Looks(_counted(kinds, loop), len(loop.body), {code.instructions[n].source for n in loop.body})
        for loop in theirs
    ]
    score = [[_alike(a, b) for b in made] for a in ours]
    pairs = _paired(score) + _apart(score, _paired(score))
    taken_ptx = {n for p, _ in pairs for n in ptx_loops[p].own}
    # A loop of the machine code without a partner is what is left of an unrolled one: it runs a few times at most.
    taken_sass = {n for loop in theirs for n in loop.own}
    # Behind no jump lie functions, the assembler's own slow ways of division among them, and what diverged warps do.
    taken_sass |= set(range(len(kinds))) - reachable(len(kinds), _jumps(code))
    called = [
        Part(tuple(range(*own)), tuple(range(*code.functions[name])), 1)
        for name, own in (functions or {}).items()
        if name in code.functions
    ]
    taken_ptx |= {n for part in called for n in part.ptx}
    taken_sass |= {n for part in called for n in part.sass}
    found = [
        Part(
            tuple(n for n in range(len(names)) if n not in taken_ptx),
            tuple(n for n in range(len(kinds)) if n not in taken_sass),
            1,
        )
    ]
    for p, s in pairs:
        mine, its = ptx_loops[p], theirs[s]
        have = sum(_anchors(names, mine.own, made_of).values())
        unrolled = round(sum(_counted(kinds, its, own=True).values()) / have) if have else 1
        found.append(Part(mine.own, its.own, max(1, unrolled)))
    products = {n: made_of[name][1] for n, name in enumerate(names) if name.startswith("wmma.mma.")}
    return [replace(part, products={n: products[n] for n in part.ptx if products.get(n)}) for part in found + called]


def _wmma(code: Code) -> dict[str, tuple[str, int]]:
    """What wmma's instructions are in this machine code, and how many times."""
    shape = next((one.name.split(".")[1] for one in code.instructions if one.opcode == "HMMA"), "")
    products, loads = _WMMA.get(shape, (0, 0))
    return {f"wmma.mma.{kind}": ("HMMA", products) for kind in ("f16", "bf16")} | {"wmma.load.f16": ("LDSM", loads)}


def _anchors(names: Sequence[str], body: Sequence[int], made_of: Mapping[str, tuple[str, int]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for n in body:
        kind, times = made_of.get(names[n], (anchor(names[n]), 1))
        if kind and times:
            found[kind] += times
    return found


def anchor(name: str) -> str:
    """The machine instruction of a PTX one, "" where there may be another number of them."""
    if name.startswith(_GROUPS):
        return ""
    return next((kind for prefix, kind in ANCHORS.items() if name == prefix or name.startswith(f"{prefix}.")), "")


def _counted(kinds: Sequence[str], loop: Loop, own: bool = False) -> Counter[str]:
    known = set(ANCHORS.values())
    return Counter(kinds[n] for n in (loop.own if own else loop.body) if kinds[n] in known)


def _alike(a: _Looks, b: _Looks) -> float:
    """0 to 1: the mix of anchors, the size, and, where they are known, the lines of the source."""
    dot = sum(a.mix[kind] * b.mix[kind] for kind in a.mix)
    norm = math.sqrt(sum(v * v for v in a.mix.values()) * sum(v * v for v in b.mix.values()))
    terms = [dot / norm if norm else float(not a.mix and not b.mix), min(a.size, b.size) / max(a.size, b.size)]
    if any(a.lines) and any(b.lines):
        terms.append(len(a.lines & b.lines) / len(a.lines | b.lines))
    return sum(terms) / len(terms)


def _paired(score: Sequence[Sequence[float]], least: float = 0.45) -> list[tuple[int, int]]:
    """Pairs (row, column), the most alike first, each row and column once; none below `least`. The assembler moves
    loops, so their order tells only what is alike to a hundredth."""
    alike = [(round(-value, 2), r, c) for r, row in enumerate(score) for c, value in enumerate(row) if value >= least]
    found: dict[int, int] = {}
    for _, r, c in sorted(alike):
        if r not in found and c not in found.values():
            found[r] = c
    return sorted(found.items())


def _apart(
    score: Sequence[Sequence[float]], pairs: Sequence[tuple[int, int]], least: float = 0.6
) -> list[tuple[int, int]]:
    """A pair for each row without one: the assembler may have joined loops, so with the most alike column."""
    left = [row for row in range(len(score)) if row not in {r for r, _ in pairs} and score[row]]
    best = {row: max(range(len(score[row])), key=lambda column: score[row][column]) for row in left}
    return [(row, column) for row, column in best.items() if score[row][column] >= least]


def in_flight(code: Code, numbers: Sequence[int], opcodes: Set[str] = frozenset({"LDG"})) -> float:
    """Bytes that a warp's loads (`opcodes`) ask of global memory before it waits, on average, in these instructions of
    one loop or none: a register that is loaded is waited for where it is used first. Asynchronous copies are not in
    it."""
    waits, asked = [], 0
    pending: set[int] = set()
    for n in (*numbers, *numbers):
        one = code.instructions[n]
        registers = [int(r) for r in re.findall(r"\bR(\d+)\b", one.words)]
        if pending.intersection(registers):
            waits.append(asked)
            asked, pending = 0, set()
        if one.opcode in opcodes and registers:
            asked += 32 * one.bytes
            pending |= set(range(registers[0], registers[0] + max(1, one.bytes // 4)))
    return sum(waits) / len(waits) if waits else float(asked)
