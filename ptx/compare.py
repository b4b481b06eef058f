"""Four implementations, one answer: `python -m ptx.compare`.

The same drawn calls run through the reference, interpreted Triton, compiled PTX (sm_80 and sm_90) and csrc/'s kernels
compiled for the CPU. Each is compared with the definition in float64 by the budget of the fuzz: at most twice
what PyTorch errs in the same dtype. The table says how much of it each takes at most, for every op.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from reliability import kernel_children

from . import build
from .compare_child import OPS

# Name -> (the backend that it is, 10 * compute capability of compiled PTX).
IMPLEMENTATIONS = {
    "reference": ("reference", 0),
    "interpreted": ("triton", 0),
    "ptx80": ("triton", 80),
    "ptx90": ("triton", 90),
    "cuda": ("cuda", 0),
}


@dataclass
class Cell:
    """Of one op on one implementation. share: the largest, of a budget; failures: calls beyond it, in words."""

    calls: int = 0
    share: float = 0.0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.failures)} NOT SO" if self.failures else f"{self.share:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx.compare", description=__doc__)
    parser.add_argument("--cases", type=int, default=4, help="drawn calls of every op (default 4)")
    parser.add_argument("--ops", nargs="+", choices=tuple(OPS), default=list(OPS))
    parser.add_argument("--only", nargs="+", choices=tuple(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    options = parser.parse_args(arguments)
    if options.cases < 1:
        parser.error(f"--cases: got {options.cases}, expected at least 1")
    absent = {name: reason for name in options.only if (reason := missing(name))}
    for name, reason in absent.items():
        print(f"compare: {name}: {reason}; --only leaves it out", file=sys.stderr)
    if absent:
        return 2
    table = compare(options.only, options.ops, options.cases)
    print_table(table, options.only)
    failures = [line for row in table.values() for cell in row.values() for line in cell.failures]
    for line in failures[:20]:
        print(f"compare: {line}", file=sys.stderr)
    return 1 if failures else 0


def environment(name: str) -> dict[str, str] | str:
    """The variables under which a process is an implementation, or what it lacks on this machine."""
    backend, arch = IMPLEMENTATIONS[name]
    return build.problem() or build.environment() if arch else kernel_children.environment(backend)


def missing(name: str) -> str | None:
    """What an implementation lacks on this machine, or None."""
    found = environment(name)
    return found if isinstance(found, str) else None


def compare(names: Sequence[str], ops: Sequence[str], count: int) -> dict[str, dict[str, Cell]]:
    """op -> implementation -> Cell."""
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(names, pool.map(lambda name: _run(name, ops, count), names)))
    for op in ops:
        others = [name for name in names if found[name][op]["drawn"] != found[names[0]][op]["drawn"]]
        if others:
            raise RuntimeError(f"{op}: {', '.join(others)} drew other calls than {names[0]}")
    return {op: {name: _cell(name, found[name][op]["calls"]) for name in names} for op in ops}


def _run(name: str, ops: Sequence[str], count: int) -> dict:
    """What an implementation found in a process of its own."""
    backend, arch = IMPLEMENTATIONS[name]
    arguments = backend, str(arch), str(count), *ops
    return kernel_children.finish(kernel_children.start("ptx.compare_child", *arguments, variables=environment(name)))


def _cell(name: str, calls: list[dict]) -> Cell:
    failures = [f"{name}: {call['error']}" for call in calls if call["error"]]
    return Cell(len(calls), max((call["share"] for call in calls), default=0.0), failures)


def print_table(table: dict[str, dict[str, Cell]], names: Sequence[str]) -> None:
    print("largest error against float64, of its budget (1 is all of it)")
    print(f"{'op':20s} {'calls':>5s}" + "".join(f"{name:>14s}" for name in names))
    for op, row in table.items():
        calls = next(iter(row.values())).calls
        print(f"{op:20s} {calls:5d}" + "".join(f"{row[name]!s:>14s}" for name in names), flush=True)


if __name__ == "__main__":
    sys.exit(main())
