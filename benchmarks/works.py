"""`python -m benchmarks.works --write`: the README's table of what works where, from records alone.

    --run interpreted    verifies every kernel on a stand-in for a GPU (interpreted, ptx80, ptx90, csrc) and keeps what
                         was found out in benchmarks/results/verified; --ops and --dtypes take a part, beside which
                         what was found out before stands on
    --write              writes the table between the README's markers, from that folder, aot.csv and cuda_compile.csv

What `adamix verify --export FILE` wrote on a GPU belongs into that folder, too: the table then names the GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adamix_kernels._auto import SHAPES
from adamix_kernels.commands.verify import exported
from adamix_kernels.verifying import Report, prover
from adamix_kernels.verifying.machine import DTYPES, Machine, jobs
from adamix_kernels.verifying.verdicts import Store

from . import RESULTS, ROOT
from .measure import record
from .measure.record import write_text
from .prefer import between

README = ROOT / "README.md"
VERIFIED = RESULTS / "verified"
HOST_LIBRARY = ROOT / "build" / "csrc" / "adamix_host_plain.so"
PAGE = ROOT / "docs" / "auto.md"
COMMAND = "python -m benchmarks.works --write"
# By stand-in: the backend, what it is called, variables of its processes, words of the table for all right.
STAND_INS = {
    "interpreted": ("triton", "Triton's interpreter", {"TRITON_INTERPRET": "1"}, "interpreted"),
    "ptx80": ("triton", "sm_80 PTX on a CPU", {}, "sm_80 code run on a CPU"),
    "ptx90": ("triton", "sm_90 PTX on a CPU", {}, "sm_90 code run on a CPU"),
    "csrc": ("cuda", "csrc/ on a CPU", {"ADAMIX_CUDA_HOST": str(HOST_LIBRARY)}, "run on a CPU"),
}
# Rows of the README, whose length is limited: mixture_lora, the gated op with its router, has none of its own.
NAMES = {
    "routed_adapter": "routed_adapter",
    "routed_lora": "routed_lora",
    "gated_adapter": "routed_adapter with gates",
    "gated_lora": "routed_lora with gates",
    "router": "linear routers of gates",
    "merge": "merge_experts, merge_lora",
    "consistency": "consistency_loss, adamix_loss, linear_adamix_loss",
}
# Which op a compiled kernel is of, by the beginning of its name or its file.
TRITON_KERNELS = {
    "adapter_": "routed_adapter",
    "lora_": "routed_lora",
    "gated_adapter_": "gated_adapter",
    "gated_lora_": "gated_lora",
    "gated_rows_": "gated_lora",
    "router": "router",
    "mixture_": "mixture_lora",
    "merge_": "merge",
}
LOSS_KERNELS = ("pair_", "rescale_")
CUDA_FILES = {
    "routed_adapter": ("routed_adapter",),
    "routed_lora": ("routed_lora",),
    "gated": ("gated_adapter", "gated_lora", "mixture_lora"),
    "router": ("router",),
    "merge": ("merge",),
    "consistency": ("consistency",),
}


def setup() -> None:
    """What a stand-in's process calls first: its kind is in WORKS_STAND_IN."""
    kind = os.environ["WORKS_STAND_IN"]
    if kind.startswith("ptx"):
        from ptx import host

        installed = host.install(int(kind.removeprefix("ptx")))
        # One order of warps: `make ptx` looks for races, in all of them.
        installed.orders = installed.orders[:1]


def run(kind: str, ops: Sequence[str], dtypes: Sequence[str], progress: prover.Progress) -> dict[str, Any]:
    """Verifies on a stand-in; what `adamix verify --export` would write, with `stand_in` in it."""
    backend, name, variables, _ = STAND_INS[kind]
    if kind == "csrc" and not HOST_LIBRARY.is_file():
        raise FileNotFoundError(f"{HOST_LIBRARY}: build it first: python -m adamix_kernels._build --host plain")
    os.environ.update(variables, WORKS_STAND_IN=kind, PYTHONPATH=str(ROOT))
    machine = Machine("cpu", name, int(kind[3:]) if kind.startswith("ptx") else 80, 1, "none", "benchmarks.works:setup")
    wanted = jobs(tuple(ops), tuple(dtypes), (backend,))
    with tempfile.TemporaryDirectory() as folder:
        found = prover.prove(wanted, machine, Store(Path(folder)), seconds=7200, one_case=600, progress=progress)
    made = exported(Report(tuple(found.values()), {}))
    return {"stand_in": kind, "commit": record.commit(RESULTS), **made}


def joined(before: Mapping[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """What was found out, with the verdicts of before that no new one replaces, if torch and Triton are the same."""
    versions = [[one["environment"]["versions"][name] for name in ("torch", "triton")] for one in (before, made)]
    if versions[0] != versions[1]:
        return made
    key = lambda v: (v["op"], v["backend"], v["dtype"], v["shape"], v["gpu"])  # noqa: E731
    anew = {key(verdict) for verdict in made["verdicts"]}
    verdicts = [verdict for verdict in before["verdicts"] if key(verdict) not in anew]
    if not verdicts:
        return made
    commits = dict.fromkeys([*before["commit"].split(", "), made["commit"]])
    return {**made, "commit": ", ".join(commits), "verdicts": [*verdicts, *made["verdicts"]]}


def kept() -> list[dict[str, Any]]:
    """What has been verified."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(VERIFIED.glob("*.json"))]


def compiled() -> dict[tuple[str, str], list[int]]:
    """(op, backend) -> targets that its kernels were compiled for, 10 * compute capability: what is launched there."""
    found: dict[tuple[str, str], set[int]] = {}
    for row in _rows(RESULTS / "aot.csv"):
        op = next((op for start, op in TRITON_KERNELS.items() if row["kernel"].startswith(start)), None)
        op = "consistency" if row["kernel"].startswith(LOSS_KERNELS) else op
        if op is not None:
            found.setdefault((op, "triton"), set()).add(int(row["target"]))
    for row in _rows(RESULTS / "cuda_compile.csv"):
        for op in CUDA_FILES.get(row["file"].partition("/")[0], ()):
            found.setdefault((op, "cuda"), set()).add(int(row["target"]))
    return {key: sorted(targets) for key, targets in found.items()}


def cell(op: str, backend: str, records: Iterable[Mapping[str, Any]], targets: Sequence[int]) -> str:
    """What is known of an op's kernels, in words."""
    parts, gpus = [], []
    words = {kind: of_all for kind, (_, _, _, of_all) in STAND_INS.items()}
    if targets:
        parts.append(f"compiled for sm_{', '.join(map(str, targets))}")
    for one in records:
        mine = [v for v in one["verdicts"] if (v["op"], v["backend"]) == (op, backend)]
        if not mine:
            continue
        right, everything = sum(v["state"] == "right" for v in mine), len(SHAPES[op]) * len(DTYPES)
        if one.get("stand_in"):
            what = words[one["stand_in"]]
            parts.append(what if right == everything else f"{what}: {right} of {everything} right")
        else:
            name = mine[0]["gpu"]
            gpus.append(name if right == everything else f"{name}: {right} of {everything} right")
    return "; ".join([*parts, f"run on {', '.join(gpus)}" if gpus else "run on no GPU yet"])


def table(records: Sequence[Mapping[str, Any]], targets: Mapping[tuple[str, str], Sequence[int]]) -> str:
    """The text between the README's markers."""
    lines = ["| forward and backward | Triton | C++/CUDA |", "|---|---|---|"]
    for op, name in NAMES.items():
        cells = [cell(op, backend, records, targets.get((op, backend), ())) for backend in ("triton", "cuda")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def devices(records: Iterable[Mapping[str, Any]]) -> str:
    """A line for each record: what was verified where."""
    lines = ["| device | backend | right | wrong, crashed, unknown | torch, Triton | on |", "|---|---|---|---|---|---|"]
    for one in records:
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for verdict in one["verdicts"]:
            groups.setdefault((verdict["gpu"], verdict["backend"]), []).append(verdict)
        versions = one["environment"]["versions"]
        for (gpu, backend), those in groups.items():
            right = sum(v["state"] == "right" for v in those)
            day = max(v["when"] for v in those)[:10]
            lines.append(
                f"| {gpu} | {backend} | {right} | {len(those) - right} | "
                f"{versions['torch']}, {versions['triton'] or 'none'} | {day} |"
            )
    return "\n".join(lines)


def readme(text: str) -> str:
    """A README with the table in it; ValueError where its markers are missing."""
    return between(text, "what works where", COMMAND, table(kept(), compiled()))


def page(text: str) -> str:
    """docs/auto.md with its table in it."""
    return between(text, "verified", COMMAND, devices(kept()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where a kernel is not right, or the README has no markers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.works", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", choices=tuple(STAND_INS))
    parser.add_argument("--ops", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(arguments)
    status = 0
    if args.run:
        made = run(args.run, args.ops, args.dtypes, _say)
        VERIFIED.mkdir(exist_ok=True)
        file = VERIFIED / f"{args.run}.json"
        whole = joined(json.loads(file.read_text(encoding="utf-8")), made) if file.is_file() else made
        write_text(file, json.dumps(whole, indent=1) + "\n")
        bad = [verdict for verdict in made["verdicts"] if verdict["state"] != "right"]
        for verdict in bad:
            print(*(verdict[word] for word in ("op", "backend", "dtype", "shape", "state", "why")), file=sys.stderr)
        status = int(bool(bad))
    if args.write:
        write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
        write_text(README, readme(README.read_text(encoding="utf-8")))
    elif not args.run:
        print(table(kept(), compiled()))
    return status


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _sayer() -> Callable[[int, int, str], None]:
    said: set[int] = set()

    def say(done: int, total: int, words: str) -> None:
        if done not in said:
            said.add(done)
            print(f"{done}/{total} {words}", file=sys.stderr, flush=True)

    return say


_say = _sayer()

if __name__ == "__main__":
    raise SystemExit(main())
