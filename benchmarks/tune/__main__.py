"""Finds the fastest block sizes of each Triton kernel on this GPU: `python -m benchmarks.tune --help`."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from adamix_kernels.ops._triton_tables import Config

from ..measure import clock, record
from .table import VARIABLE, Chosen, ShapeClass, installed, write

# Candidates within this share of the fastest count as equally fast.
TIE = 0.01


class Trial(NamedTuple):
    """One candidate: its seconds a call, or why it was refused."""

    config: Config
    seconds: float | None
    refused: str | None


def trials(
    candidates: Iterable[Config],
    check: Callable[[Config], str | None],
    timer: Callable[[Config], float],
) -> list[Trial]:
    """Checks each candidate, then times it; one that is wrong, or cannot run, is never timed.

    check: None when the results are right, else what is wrong in words. timer: seconds a call.
    """
    made, seen = [], set()
    for config in candidates:
        if config in seen:
            continue
        seen.add(config)
        problem = check(config)
        made.append(Trial(config, None if problem is not None else timer(config), problem))
    return made


def fastest(made: Sequence[Trial], tie: float = TIE) -> Trial | None:
    """The first trial within `tie` of the fastest, or None when all were refused."""
    timed = [trial for trial in made if trial.refused is None]
    if not timed:
        return None
    limit = min(trial.seconds for trial in timed) * (1 + tie)
    return next(trial for trial in timed if trial.seconds <= limit)


def tune_class(
    workload, shape: ShapeClass, capability: int, timer: Callable[[object], float], ends: float = float("inf")
) -> list[Trial]:
    """Every candidate of the workload, installed, checked and timed; the shipped one stands first, so it wins ties.

    ends: when by time.monotonic() no further candidate is begun; the shipped one always is.
    """

    def check(config: Config) -> str | None:
        with installed(shape, config, capability):
            return workload.problem()

    def seconds(config: Config) -> float:
        with installed(shape, config, capability):
            return timer(workload)

    others = itertools.takewhile(lambda _: time.monotonic() < ends, workload.candidates)
    return trials(itertools.chain([workload.shipped], others), check, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a class had no correct candidate (it is left out of the table); 2 where nothing can run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", required=True, help=f"JSON to write (replaced); {VARIABLE}=FILE uses it")
    parser.add_argument("--kernel", action="append", help="this kernel only (may be repeated; default: all)")
    parser.add_argument("--repeats", type=int, default=20, help="timed replays a candidate (default 20)")
    parser.add_argument("--seconds", type=float, help="begin no candidate after so many seconds")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats: got {options.repeats}, expected at least 1")
    if not torch.cuda.is_available():
        print("tune: block sizes are timed on a CUDA GPU, and this machine has none", file=sys.stderr)
        return 2
    try:
        from . import workloads as work
    except ModuleNotFoundError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    problem = work.problem()
    unknown = sorted(set(options.kernel or ()) - set(work.KERNELS))
    if unknown:
        problem = f"--kernel: got {', '.join(unknown)}, expected {', '.join(work.KERNELS)}"
    if problem is not None:
        print(f"tune: {problem}", file=sys.stderr)
        return 2

    chosen: Chosen = {}
    capability, failed = work.capability(torch.device("cuda")), 0
    facts = record.environment()
    about = {k: facts[k] for k in ("gpu_name", "torch", "triton", "driver", "commit", "date")}
    about["repeats"] = str(options.repeats)
    ends = float("inf") if options.seconds is None else time.monotonic() + options.seconds
    # What training uses most comes first: 2-byte elements, narrow tiles.
    shapes = sorted(work.shape_classes(options.kernel or work.KERNELS), key=lambda s: (s.itemsize, s.width))
    for done, shape in enumerate(shapes):
        if time.monotonic() > ends:
            print(f"{len(shapes) - done} of {len(shapes)} classes left out: the time was used up", flush=True)
            break
        workload = work.make(shape, torch.device("cuda"))
        made = tune_class(workload, shape, capability, lambda w: gpu_seconds(w, options.repeats), ends)
        best = fastest(made)
        print(report(shape, made, best), flush=True)
        if best is None:
            failed += 1
        else:
            chosen[shape] = best.config
        write(options.out, chosen, capability, about)
    write(options.out, chosen, capability, about)
    print(f"wrote {len(chosen)} classes to {Path(options.out).resolve()}")
    return 1 if failed else 0


def gpu_seconds(workload, repeats: int) -> float:
    """Median seconds a call, from replays of a CUDA graph that goes once through all inputs."""
    effort = clock.Effort(seconds=0.0, least=repeats, most=repeats, warmup=2)
    return statistics.median(clock.graph_seconds(workload.call, len(workload.inputs), effort))


def report(shape: ShapeClass, made: Sequence[Trial], best: Trial | None) -> str:
    """One line: the choice, the shipped configuration beside it, and how many were refused."""
    refused = [trial for trial in made if trial.refused is not None]
    tail = f"{len(refused)} of {len(made)} refused" + (f", first: {refused[0].refused}" if refused else "")
    if best is None:
        return f"{shape}: nothing correct; {tail}"
    shipped = made[0]
    beside = "refused" if shipped.seconds is None else f"{shipped.seconds * 1e6:.1f} us"
    return (
        f"{shape}: {tuple(best.config)} {best.seconds * 1e6:.1f} us; shipped {tuple(shipped.config)} {beside}; {tail}"
    )


if __name__ == "__main__":
    sys.exit(main())
