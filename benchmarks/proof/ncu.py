"""`python -m benchmarks.proof.ncu --out CSV`: what Nsight Compute counts of four calls of ops, as rows.

Instructions of warps, bytes to and from memory and the time of each call's own launches, together: what
benchmarks/results/count.csv has predictions of (count/beside.py). Clocks are left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import ROOT, sizes
from ..count.cases import Work, bound, works
from ..measure import record
from ..measure.clock import synchronize
from ..measure.ledger import AbsentError, describe
from ..ops.cases import Draw

BACKENDS = ("cuda", "triton")
# (folder of the op, its name and direction, size): read once, read twice, many exponentials, many small tensors.
CALLS = (
    ("routed_adapter", "routed_adapter/forward", sizes.ADAPTER_64K.words),
    ("routed_adapter", "routed_adapter/backward", sizes.ADAPTER_64K.words),
    ("consistency", "adamix_loss/both", sizes.LOSS_GPT2.words),
    ("merge", "merge_banks/forward", sizes.BANKS.words),
)
# Nsight Compute's name -> the row's metric and unit.
METRICS = {
    "smsp__inst_executed.sum": ("instructions", "1"),
    "dram__bytes_read.sum": ("dram_read", "bytes"),
    "dram__bytes_write.sum": ("dram_written", "bytes"),
    "gpu__time_duration.sum": ("ncu_time", "ns"),
}
# The kernel of torch.cuda._sleep: one stands before each call.
_MARK = "spin_kernel"
# PyTorch's own kernels are no work of an op's.
_OTHERS = ("at::", "cub::", "thrust::", "cublas", "cutlass")


def calls() -> Iterator[tuple[Work, str]]:
    for folder, op, shape in CALLS:
        for work in works(folder):
            if work.op == op and work.case.shape == shape and work.dtype in ("bfloat16", "float32"):
                yield from ((work, backend) for backend in BACKENDS)


def prepared(work: Work, backend: str, device: torch.device) -> Callable[[], object]:
    """The call, its inputs made, and what it needs of a forward done."""
    inputs = work.case.make(Draw(device, work.case.dtype, seed=2))
    gradient = work.direction != "forward"
    made = bound(work.case, backend, replace(inputs, extra=tuple(inputs.extra)), gradient)
    if work.direction == "forward":
        return made.call
    if work.direction == "both":
        return lambda: torch.autograd.grad(made.call(), list(made.leaves), inputs.grad)
    out = made.call()
    return lambda: torch.autograd.grad(out, list(made.leaves), inputs.grad, retain_graph=True)


def program(device: torch.device, seconds: float | None) -> int:
    """What runs under the profiler: every call once to compile, then once between start and stop.

    It ends by itself after so many seconds: the profiler writes what it counted when the program is done.
    """
    done, ends = 0, float("inf") if seconds is None else time.monotonic() + seconds
    for work, backend in calls():
        if time.monotonic() > ends:
            break
        call = None
        try:
            call = prepared(work, backend, device)
            call()
            synchronize(device)
        except (AbsentError, RuntimeError) as error:
            print(f"{work} {backend}: {describe(error)}", flush=True)
        torch.cuda.profiler.start()
        torch.cuda._sleep(1000)
        if call is not None:
            call()
            done += 1
        synchronize(device)
        torch.cuda.profiler.stop()
        del call
        torch.cuda.empty_cache()
    return 0 if done else 1


def find() -> str | None:
    """The program ncu."""
    places = [shutil.which("ncu"), "/usr/local/cuda/bin/ncu"]
    places += map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True))
    return next((place for place in places if place and Path(place).exists()), None)


def command(ncu: str, log: Path, seconds: float | None = None) -> list[str]:
    options = ["--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off"]
    options += ["--target-processes", "application-only", "--metrics", ",".join(METRICS)]
    options += ["--page", "raw", "--csv", "--print-units", "base", "--log-file", str(log)]
    program = [sys.executable, "-m", "benchmarks.proof.ncu", "--program"]
    # Half of it: for the imports before, and for what the profiler writes after.
    return [ncu, *options, *program, *([] if seconds is None else [f"--seconds={0.5 * seconds:.0f}"])]


def launches(text: str) -> list[dict[str, str]]:
    """The launches in what ncu wrote: kernel's name and metrics by column."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(line for line in lines[start:] if line.startswith('"'))
    # The row behind the header has the units.
    return [row for row in rows if row["ID"]]


def counted(text: str, names: Sequence[tuple[Work, str]]) -> list[record.Row]:
    """Rows of every call that launched something, the sums over its own launches."""
    groups: list[list[dict[str, str]]] = []
    for launch in launches(text):
        if _MARK in launch["Kernel Name"]:
            groups.append([])
        elif groups and not any(word in launch["Kernel Name"] for word in _OTHERS):
            groups[-1].append(launch)
    made = []
    for (work, backend), group in zip(names, groups):
        if not group:
            continue
        kernels = "+".join(launch["Kernel Name"].partition("(")[0] for launch in group)
        for name, (metric, unit) in METRICS.items():
            value = sum(float(launch[name].replace(",", "")) for launch in group)
            made.append(record.row(work.op, backend, work.case.shape, work.dtype, metric, unit, value, kernels[:200]))
    return made


def ended(words: Sequence[str], seconds: float | None) -> int:
    """Runs the command, at most so many seconds; its exit status. What it has written by then is worth as much."""
    with subprocess.Popen(words, cwd=ROOT) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            # The profiler's own child too, which is of this process's group.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.killpg(os.getpgrp(), signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
            process.kill()
            return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when nothing was counted; 2 where there is no ncu or no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof.ncu", description=__doc__)
    parser.add_argument("--out", help="CSV to write")
    parser.add_argument("--seconds", type=float, help="count no longer than that")
    parser.add_argument("--program", action="store_true", help="only make the calls, for the profiler")
    options = parser.parse_args(arguments)
    ncu = find()
    if not torch.cuda.is_available() or (ncu is None and not options.program):
        print("ncu: " + ("no GPU" if ncu else "Nsight Compute was not found"), file=sys.stderr)
        return 2
    if options.program:
        return program(torch.device("cuda"), options.seconds)
    log = Path(options.out).with_suffix(".log.csv.txt")
    status = ended(command(ncu or "", log, options.seconds), options.seconds)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    rows = counted(text, list(calls()))
    if rows:
        record.write(options.out, rows)
    said = [line for line in text.splitlines() if line.startswith("==ERROR==")]
    print(f"{len({(row.op, row.backend) for row in rows})} calls counted" + (f"; {said[0]}" if said else ""))
    return 0 if rows else status or 1


if __name__ == "__main__":
    sys.exit(main())
