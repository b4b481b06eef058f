"""Counting in processes of their own, one for each backend and target: an end of one takes nothing from the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from adamix_kernels._scratch import temporary_folder

from .. import ROOT
from .table import Row

# 10 * compute capability, by the backend; the emulated csrc/, which takes longest, first.
TARGETS = {"cuda": (70, 80, 90), "triton": (80, 90)}


def pairs(backends: Sequence[str], targets: Sequence[int]) -> list[tuple[str, int]]:
    """Of these backends all targets, or those of them that are named."""
    return [(b, t) for b, all_of_it in TARGETS.items() if b in backends for t in all_of_it if t in (targets or (t,))]


def run(
    wanted: Sequence[tuple[str, int]], arguments: Sequence[str], jobs: int, take: Callable[[Row], None]
) -> list[str]:
    """take(row) for every row of `python -m benchmarks.count <arguments> --of BACKEND TARGET`, `jobs` of those at a
    time; what went wrong, a line for each process that failed. What they say goes to stderr as it comes."""
    lock, wrong = threading.Lock(), []

    def one(pair: tuple[str, int]) -> None:
        backend, target = pair
        command = [sys.executable, "-m", "benchmarks.count", *arguments, "--of", backend, str(target)]
        began, rows = time.perf_counter(), 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    with lock:
                        take(Row(**json.loads(line)))
                    rows += 1
        with lock:
            minutes = (time.perf_counter() - began) / 60
            print(f"{backend} sm_{target}: {rows} rows in {minutes:.1f} min", file=sys.stderr, flush=True)
            if child.returncode:
                wrong.append(f"{backend} sm_{target}: exit status {child.returncode} after {rows} rows")

    with temporary_folder("adamix-count-") as folder, ThreadPoolExecutor(jobs) as pool:
        # What an ended process leaves there goes with the folder.
        environment = {**os.environ, "TMPDIR": str(folder)}
        list(pool.map(one, wanted))
    return wrong


def give(row: Row) -> None:
    """To the process that waits for it."""
    print(json.dumps(asdict(row)), flush=True)


def processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
