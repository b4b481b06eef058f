"""`python -m benchmarks.prefer --write`: which kernels "auto" prefers where, from records alone.

adamix_kernels/verifying/preferences.json: for an op, a dtype, a class of shapes and GPUs from a compute capability up,
the backends in order, and what that order comes from: times measured on such a GPU, if benchmarks/results has any,
else the predictions from counts of compiled code. A backend without either is not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adamix_kernels._auto import LIMITS, SHAPES
from adamix_kernels.verifying.machine import DTYPES, KERNELS
from adamix_kernels.verifying.table import FILE, REFERENCE

from . import RESULTS, ROOT
from .count import table as count_table
from .measure import record
from .measure.record import write_text

PAGE = ROOT / "docs" / "auto.md"
COMMAND = "python -m benchmarks.prefer --write"
# 10 * compute capability, and the GPU of each that is predicted.
GPUS = {70: "V100", 80: "A100", 90: "H100", 100: "B200"}
OPS = {
    "routed_adapter": "routed_adapter", "routed_lora": "routed_lora", "gated_adapter": "gated_adapter",
    "gated_lora": "gated_lora", "router": "router", "mixture_lora": "mixture_lora", "merge_experts": "merge",
    "merge_banks": "merge", "merge_lora": "merge", "adamix_loss": "consistency", "adamix_loss_expected": "consistency",
    "adamix_loss_full": "consistency", "consistency_loss": "consistency", "linear_adamix_loss": "consistency",
}  # fmt: skip
# A share this low is all start and end: which of two is lower says nothing.
LEAST_SHARE = 0.02

# (op, dtype, shape class, capability) -> {backend: {case: speed, higher is better}}
Speeds = dict[tuple[str, str, str, int], dict[str, dict[str, float]]]


def shape_class(op: str, shape: str) -> str:
    """The class of a row's shape, as `_auto.shape_class` has it."""
    if len(SHAPES[op]) == 1:
        return SHAPES[op][0]
    rank, experts, groups = (int((re.search(rf"\b{word}(\d+)", shape) or [0, 1])[1]) for word in ("r", "M", "groups"))
    size = int(shape.rpartition("x")[2]) if op == "consistency" else rank * experts * groups
    return SHAPES[op][size > LIMITS[op]]


def counted(rows: Iterable[count_table.Row]) -> Speeds:
    """Predicted shares of copy bandwidth."""
    found: Speeds = {}
    for row in rows:
        op = OPS.get(row.op.partition("/")[0])
        for capability, gpu in GPUS.items():
            share = row.shares.get(gpu)
            if op is not None and share is not None:
                key = op, row.dtype, shape_class(op, row.shape), capability
                found.setdefault(key, {}).setdefault(row.backend, {})[f"{row.op} {row.shape}"] = share
    return found


def measured(rows: Iterable[record.Row]) -> Speeds:
    """Calls a second, of the medians measured on one of GPUS; the reference's too."""
    found: Speeds = {}
    for row in rows:
        op = OPS.get(row.op.partition("/")[0])
        capability = next((c for c, gpu in GPUS.items() if gpu in row.gpu_name), None)
        if op is None or capability is None or row.metric != "time_p50" or row.backend not in (*KERNELS, REFERENCE):
            continue
        key = op, row.dtype, shape_class(op, row.shape), capability
        found.setdefault(key, {}).setdefault(row.backend, {})[f"{row.op} {row.shape}"] = 1 / row.value
    return found


def order(speeds: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Backends by the geometric mean over the cases that all of them have; those without a common case by name."""
    common = set.intersection(*(set(cases) for cases in speeds.values()))

    def rank(name: str) -> tuple[float, str]:
        return -sum(math.log(max(LEAST_SHARE, speeds[name][case])) for case in common), name

    return sorted(speeds, key=rank)


def table(counts: Speeds, times: Speeds) -> list[dict[str, Any]]:
    """The rows of preferences.json."""
    return [
        {
            "op": op,
            "dtype": dtype,
            "shape": shape,
            "capability": capability,
            **_row(counts, times, op, dtype, shape, capability),
        }
        for op, shapes in SHAPES.items()
        for shape in shapes
        for dtype in DTYPES
        for capability in GPUS
    ]


def _row(counts: Speeds, times: Speeds, op: str, dtype: str, shape: str, capability: int) -> dict[str, Any]:
    others = [d for d in DTYPES if d != dtype and (d == "float32") == (dtype == "float32")]
    others += [d for d in DTYPES if d not in (dtype, *others)]
    nearest = [(d, s) for s in (shape, *(s for s in SHAPES[op] if s != shape)) for d in (dtype, *others)]
    for key in nearest:
        found = times.get((op, *key, capability), {})
        if REFERENCE in found:
            ranked = order(found)
            return _as_row(ranked[: ranked.index(REFERENCE)], "times on", key, (dtype, shape), capability)
    ranked, first = [], None
    for key in nearest:
        found = counts.get((op, *key, capability), {})
        if found:
            ranked += [name for name in order(found) if name not in ranked]
            first = first or key
    if first is None:
        return {"order": [REFERENCE], "source": f"no kernel has a count or a time for the {GPUS[capability]}"}
    return _as_row(ranked, "what counts of compiled code predict for", first, (dtype, shape), capability)


def _as_row(
    ranked: Sequence[str], how: str, key: tuple[str, str], wanted: tuple[str, str], capability: int
) -> dict[str, Any]:
    as_ = "" if key == wanted else f", {key[0]} of the class {key[1]!r} standing for it"
    return {"order": [*ranked, REFERENCE], "source": f"{how} the {GPUS[capability]}{as_}"}


def text() -> str:
    """preferences.json, one row a line."""
    files = [path for path in sorted(RESULTS.glob("*.csv")) if record.has_schema(path)]
    rows = table(counted(count_table.committed()), measured(row for path in files for row in record.read(path)))
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"written by": "{COMMAND}", "rows": [\n{lines}\n]}}\n'


def page_table() -> str:
    """The preferences as a Markdown table: a line for each op, class and source, the dtypes with one order together."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in json.loads(text())["rows"]:
        key = row["op"], row["shape"], f"{row['capability'] / 10:.1f}", ", ".join(row["order"])
        lines.setdefault(key, []).append(row["dtype"])
    head = ["| op | shapes | compute capability from | dtypes | order |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(f"| {o} | {s} | {c} | {', '.join(d)} | {w} |" for (o, s, c, w), d in lines.items())])


def between(text: str, name: str, command: str, made: str) -> str:
    """A page with `made` between the markers of a command; ValueError where they are missing."""
    begin, end = f"<!-- {name}, written by `{command}`: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"got no markers, expected {begin!r} and then {end!r}")
    return f"{before}{begin}\n{made}\n{end}{after}"


def page() -> str:
    """docs/auto.md with the table in it."""
    return between(PAGE.read_text(encoding="utf-8"), "preferences", COMMAND, page_table())


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where the file is not what the records give."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefer", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}; else it is compared")
    made = text()
    if parser.parse_args(arguments).write:
        write_text(FILE, made)
        write_text(PAGE, page())
        return 0
    for path, wanted in ((FILE, made), (PAGE, page())):
        if path.read_text(encoding="utf-8") != wanted:
            print(f"{path}: not what benchmarks/results gives: {COMMAND}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
