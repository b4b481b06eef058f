"""The loops of a program, from its jumps alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Where a jump leads, and whether the instruction after it may follow.
Jump = tuple[Sequence[int], bool]


@dataclass(frozen=True)
class Loop:
    """first: the instruction that every iteration begins with. body: all of them; own: those in no loop inside it."""

    first: int
    body: tuple[int, ...]
    own: tuple[int, ...]


def loops(count: int, jumps: Mapping[int, Jump]) -> list[Loop]:
    """The natural loops among `count` instructions, by their first instructions; jumps: those of jumps, exits too."""
    runs = reachable(count, jumps)
    blocks = {first: last for first, last in _blocks(count, jumps).items() if first in runs}
    after = {first: _after(last, count, jumps) for first, last in blocks.items()}
    before: dict[int, list[int]] = {first: [] for first in blocks}
    for first, nexts in after.items():
        for to in nexts:
            before[to].append(first)
    bodies: dict[int, set[int]] = {}
    for tail, head in _back_edges(after):
        body, todo = bodies.setdefault(head, {head}), [tail]
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += before[block]
    made = []
    for head, body in sorted(bodies.items()):
        inside = set().union(*(b for h, b in bodies.items() if h != head and h in body and b < body))
        made.append(Loop(head, _instructions(body, blocks), _instructions(body - inside, blocks)))
    return made


def reachable(count: int, jumps: Mapping[int, Jump]) -> set[int]:
    """The instructions that may run, from the first one on."""
    blocks, seen, todo = _blocks(count, jumps), set(), [0][:count]
    while todo:
        first = todo.pop()
        if first not in seen:
            seen.add(first)
            todo += _after(blocks[first], count, jumps)
    return {n for first in seen for n in range(first, blocks[first] + 1)}


def _blocks(count: int, jumps: Mapping[int, Jump]) -> dict[int, int]:
    """First instruction -> last, of each stretch that is entered at its first alone."""
    firsts = {0, *(at + 1 for at in jumps), *(to for targets, _ in jumps.values() for to in targets)}
    ordered = sorted(first for first in firsts if first < count)
    return dict(zip(ordered, [first - 1 for first in ordered[1:]] + [count - 1]))


def _after(last: int, count: int, jumps: Mapping[int, Jump]) -> list[int]:
    targets, falls = jumps.get(last, ((), True))
    return [to for to in (*targets, *([last + 1] if falls else [])) if to < count]


def _back_edges(after: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
    """Edges to a block that is on the way there from the beginning."""
    found, seen, way = [], {0}, {0}
    stack = [(0, iter(after.get(0, ())))]
    while stack:
        block, nexts = stack[-1]
        to = next(nexts, None)
        if to is None:
            stack.pop()
            way.discard(block)
        elif to in way:
            found.append((block, to))
        elif to not in seen:
            seen.add(to)
            way.add(to)
            stack.append((to, iter(after[to])))
    return found


def _instructions(body: set[int], blocks: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(n for first in sorted(body) for n in range(first, blocks[first] + 1))
