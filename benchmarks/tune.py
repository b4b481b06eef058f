"""Finds the fastest block sizes of each Triton kernel on this GPU: `python -m benchmarks.tune --help`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from adamix_kernels.ops._triton_tables import Config

from . import record

# Candidates within this share of the fastest count as equally fast.
TIE = 0.01
VARIABLE = "ADAMIX_TRITON_TABLE"


class Trial(NamedTuple):
    """One candidate: its seconds a call, or why it was refused."""

    config: Config
    seconds: float | None
    refused: str | None


class ShapeClass(NamedTuple):
    """What a table's row is for: a kernel, bytes of an element, columns of the narrow tile."""

    kernel: str
    itemsize: int
    width: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.itemsize}x{self.width}"


# {(class): chosen block sizes} of one GPU.
Chosen = dict[ShapeClass, Config]


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


def table(chosen: Chosen, capability: int) -> dict[str, dict[str, dict[str, list[int]]]]:
    """What ops/_triton_tables.py reads: {kernel: {"90": {"2x16": [rows, cols, num_warps, num_stages]}}}."""
    made: dict = {}
    for (kernel, itemsize, width), config in sorted(chosen.items()):
        made.setdefault(kernel, {}).setdefault(str(capability), {})[f"{itemsize}x{width}"] = list(config)
    return made


def write(path: str | os.PathLike, chosen: Chosen, capability: int, about: dict[str, str]) -> None:
    """Writes the table and, under "about", where it comes from; whole or not at all, an older file is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"about": about, **table(chosen, capability)}, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def installed(shape: ShapeClass, config: Config, capability: int) -> Iterator[None]:
    """Meanwhile the kernel takes `config` for that class, by the door a user's table comes in."""
    before = os.environ.get(VARIABLE)
    with tempfile.TemporaryDirectory(prefix="adamix-tune-") as folder:
        # The tables are cached by their path: every candidate needs another.
        path = os.path.join(folder, "table.json")
        write(path, {shape: config}, capability, {})
        os.environ[VARIABLE] = path
        try:
            yield
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


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
        from . import tune_workloads as work
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
        made = tune_class(workload, shape, capability, lambda w: work.gpu_seconds(w, options.repeats), ends)
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
