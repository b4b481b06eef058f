"""Breaks PTX, one instruction at a time: what the executor must notice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """kind: what was done. line: in the PTX, from 1."""

    kind: str
    line: int
    was: str
    text: str


def _number(change: Callable[[int], int]) -> Callable[[str], str]:
    return lambda line: re.sub(r"(\d+)(?=\s*;)", lambda m: str(change(int(m.group()))), line)


def _offset(by: int) -> Callable[[str], str]:
    """Moves the global address of an access, its last one in brackets."""

    def moved(line: str) -> str:
        found = list(re.finditer(r"\+\s*(-?\d+)\s*\]", line))
        if not found:
            return line
        last = found[-1]
        return f"{line[: last.start()]}+ {int(last.group(1)) + by} ]{line[last.end() :]}"

    return moved


def _without_guard(line: str) -> str:
    return re.sub(r"@!?%p\d+\s+", "", line)


def _nothing(line: str) -> str:
    return ""


# kind -> (instructions, what is done to one of them)
KINDS: dict[str, tuple[str, Callable[[str], str]]] = {
    "barrier dropped": (r"\bbar\.sync", _nothing),
    "cp.async wait dropped": (r"\bcp\.async\.wait_group", _nothing),
    "cp.async wait one group late": (r"\bcp\.async\.wait_group", _number(lambda n: n + 1)),
    "cp.async source size dropped": (r"\bcp\.async\.c[ag]\.", lambda line: re.sub(r", %r\d+;", ";", line)),
    "wgmma wait dropped": (r"\bwgmma\.wait_group", _nothing),
    "wgmma wait one group late": (r"\bwgmma\.wait_group", _number(lambda n: n + 1)),
    "wgmma commit dropped": (r"\bwgmma\.commit_group", _nothing),
    "load mask dropped": (r"^\s*@!?%p\d+\s+ld\.global", _without_guard),
    "store mask dropped": (r"^\s*@!?%p\d+\s+st\.global", _without_guard),
    "load address far off": (r"\bld\.global", _offset(1 << 20)),
    "store address far off": (r"\bst\.global", _offset(1 << 20)),
    "copy address far off": (r"\bcp\.async\.c[ag]\.", _offset(1 << 20)),
    "vector load misaligned": (r"\bld\.global\.\S*v[24]", _offset(4)),
    "vector store misaligned": (r"\bst\.global\.\S*v[24]", _offset(4)),
    "shared store dropped": (r"\bst\.shared", _nothing),
    "load dropped": (r"\bld\.global", _nothing),
    "zero dropped": (r"^\s*mov\.[bfu]32\s+%\w+, (0|0f00000000);", _nothing),
}


def mutants(text: str, most: int = 4, kinds: tuple[str, ...] = tuple(KINDS)) -> Iterator[Mutant]:
    """At most so many of a kind, spread over the kernel; a kind whose instruction it does not hold has none."""
    lines = text.splitlines()
    for kind in kinds:
        pattern, change = KINDS[kind]
        found = [n for n, line in enumerate(lines) if re.search(pattern, line)]
        for n in found[:: max(1, -(-len(found) // most))]:
            new = change(lines[n])
            if new != lines[n]:
                yield Mutant(kind, n + 1, lines[n].strip(), "\n".join([*lines[:n], new, *lines[n + 1 :]]))
