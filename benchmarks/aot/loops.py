"""Loop variables that Triton 3.6 drops although they count: `lost(ttir)`.

A pass of Triton's (dead arguments of scf.for) asks which values the operations inside a loop and those behind it need,
and overlooks the bounds of the loops inside it (triton-lang/triton#9036). A variable that an outer
loop carries for an inner loop's bounds alone is then taken for unused: its sum goes, the bounds stay those of the first
turn, and the result is wrong without a word. Interpreted kernels do not show it. The way out is to use the variable in
an address or a mask as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")
_LOCATION = re.compile(r"\s*loc\(.*$")
_EFFECTS = ("tt.store", "tt.atomic", "tt.print", "tt.assert", "tt.descriptor_store", "tt.return", "cf.", "scf.while")


@dataclass
class _Loop:
    """An scf.for: its bounds; of each variable the value before, inside, after a turn, and behind the loop."""

    bounds: list[str]
    before: list[str]
    inside: list[str]
    behind: list[str]
    after: list[str] = field(default_factory=list)
    needed: bool = False  # something inside has an effect


def lost(ttir: str) -> list[str]:
    """The names of the variables of loops in a kernel's TTIR that Triton would drop and must not."""
    needs, loops, roots, used = _read(ttir)
    # What anything names behind the loop is kept, bounds too.
    behind = {loop.after[n] for loop in loops for n, value in enumerate(loop.behind) if value in used}
    kept, right = _live(needs, loops, roots | behind, bounds=False), _live(needs, loops, roots, bounds=True)
    kept |= {loop.inside[n] for loop in loops for n, value in enumerate(loop.behind) if value in used}
    return [name for loop in loops for name in loop.inside if name in right and name not in kept]


def _read(ttir: str) -> tuple[dict[str, list[str]], list[_Loop], set[str], set[str]]:
    """(value -> the values it is made of, loops, values that operations with effects need, all that are named).

    Sibling regions may use one name twice; names are made unique by the line that defines them.
    """
    needs: dict[str, list[str]] = {}
    loops: list[_Loop] = []
    roots: set[str] = set()
    used: set[str] = set()
    scopes: list[dict[str, str]] = [{}]
    regions: list[tuple[str, _Loop | None, list[str]]] = []

    def use(text: str) -> list[str]:
        found = (name.split("#") for name in _NAME.findall(text))
        values = [value for name, *number in found if (value := resolved(name, number)) is not None]
        used.update(values)
        return values

    def resolved(name: str, number: list[str]) -> str | None:
        made = next((scope[name] for scope in reversed(scopes) if name in scope), None)
        return made and (f"{made}#{number[0]}" if number else made)

    def define(name: str, line: int) -> str:
        scopes[-1][name] = f"{name}@{line}"
        return f"{name}@{line}"

    for number, raw in enumerate(ttir.splitlines()):
        line = _LOCATION.sub("", raw).strip()
        if line.startswith("}"):
            kind, loop, results = regions.pop() if regions else ("", None, [])
            scopes.pop() if len(scopes) > 1 else None
            if line.endswith("{"):  # } else {
                regions.append((kind, loop, results))
                scopes.append({})
            continue
        head, _, body = line.partition(" = ") if line.startswith("%") else ("", "", line)
        kind = body.split("(")[0].split()[0].strip('"') if body else ""
        names = [part.strip() for part in head.split(",")] if head else []
        results = []
        for name in names:
            stem, _, count = name.partition(":")
            value = define(stem, number)
            results += [f"{value}#{n}" for n in range(int(count))] if count else [value]
        if kind == "scf.for":
            bounds = use(body.split("iter_args")[0].split(" = ", 1)[1])
            pairs = (
                re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", body.split("iter_args", 1)[1]) if "iter_args" in body else []
            )
            loop = _Loop(bounds, [v for _, init in pairs for v in use(init)], [], results)
            scopes.append({})
            define(body.split()[1], number)
            loop.inside = [define(name, number) for name, _ in pairs]
            loops.append(loop)
            regions.append((kind, loop, results))
            continue
        operands = use(body)
        if kind == "scf.yield" and regions:
            outer, loop, behind = regions[-1]
            if loop is not None:
                loop.after = operands
            elif outer == "scf.if":
                for value, operand in zip(behind, operands):
                    needs.setdefault(value, []).append(operand)
            else:
                roots.update(operands)
        elif kind.startswith(_EFFECTS):
            roots.update(operands)
            for _, loop, _ in regions:
                if loop is not None:
                    loop.needed = True
        for value in results:
            needs.setdefault(value, []).extend(operands)
        if line.endswith("{") or line.endswith("({"):
            if kind == "scf.if":
                roots.update(operands)
            regions.append((kind, None, results))
            scopes.append({})
            for name in re.findall(r"(%[\w.$-]+):", body) if kind == "tt.func" else []:
                define(name, number)
        elif line.startswith("^"):
            for name in re.findall(r"(%[\w.$-]+):", line):
                define(name, number)
    return needs, loops, roots, used


def _live(needs: dict[str, list[str]], loops: list[_Loop], roots: set[str], *, bounds: bool) -> set[str]:
    """The values that count, with those of inner loops' bounds or, as Triton has it, without."""
    live: set[str] = set()
    queue = list(roots)
    if bounds:
        queue += [value for loop in loops if loop.needed for value in loop.bounds]
    variables = {
        name: (loop, place)
        for loop in loops
        for names in (loop.inside, loop.behind)
        for place, name in enumerate(names)
    }
    while queue:
        value = queue.pop()
        if value in live:
            continue
        live.add(value)
        queue += needs.get(value, [])
        if value in variables:
            loop, place = variables[value]
            queue += [loop.before[place], loop.after[place], loop.inside[place]]
            queue += loop.bounds if bounds else []
    return live
