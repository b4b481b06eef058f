"""`python -m benchmarks.run host`: what a call costs on the host, in torch.add of two 8 x 8 tensors of the same run.

The tensors lie on the CPU and nothing is launched (driver.py). What a GPU's own calls cost beside that is not in
it: the allocator, cudaGetDevice, the driver's launch. Time is this thread's on a processor: nothing waits for anything,
and what else the machine does is not the op's, but that it has the caches. A whole step (steps.py) is measured
with our calls and without: the difference, over the rest.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from ..measure import record
from ..measure.harness import Check, RedCheckError, Spread, spread, time_paired
from . import cases as host_cases
from . import steps as host_steps

# Calls of one sample, as the layers of a model follow each other: of an op, of an add, and of a whole step.
OP_CALLS, ADD_CALLS, STEP_CALLS = 5, 20, 5


@dataclass(frozen=True)
class Row:
    """One line of the table: host time in adds, and in microseconds."""

    backend: str
    name: str
    adds: Spread
    microseconds: Spread


def add_parser(commands) -> None:
    parser = commands.add_parser("host", help="host time of each op, with a driver that launches nothing")
    parser.add_argument("--rounds", type=int, default=400, help=f"samples of every call, {OP_CALLS} calls each")
    parser.add_argument("--backends", nargs="+", default=list(host_cases.BACKENDS), choices=host_cases.BACKENDS)
    parser.add_argument("--only", default="", help="calls and steps whose name holds this")
    parser.add_argument("--steps", type=int, default=60, help=f"samples of every whole step, {STEP_CALLS} steps each")
    parser.add_argument("--out", help="CSV to write, such as benchmarks/results/host_cpu.csv")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Exit status 0; 1 when a call did not launch what it should and so nothing was timed."""
    torch.set_num_threads(1)
    made: list[record.Row] = []
    for backend in options.backends:
        problem = host_cases.prepare(backend)
        if problem is not None:
            print(f"host: {backend} is left out: {problem}", file=sys.stderr)
            continue
        try:
            rows = measure(backend, options.rounds, options.only)
        except RedCheckError as error:
            print(f"host: {error}", file=sys.stderr)
            return 1
        if rows:
            _print(rows)
        shares = measure_steps(backend, options.steps, options.only) if options.steps else []
        _print_steps(shares)
        load = os.getloadavg()[0]
        note = f"thread time, rounds={options.rounds} of calls, {options.steps} of steps, load_after={load:.1f}"
        made += [*_records(rows, note), *_step_records(shares, note)]
    if options.out:
        record.write(options.out, made)
        print(f"wrote {len(made)} rows to {options.out}")
    return 0


def measure(backend: str, rounds: int, only: str = "") -> list[Row]:
    """Host time of every case of a backend that `host_cases.prepare` got ready."""
    cases = [case for case in host_cases.cases(backend) if only in case.name]
    if not cases:
        return []
    a, b = torch.ones(8, 8), torch.ones(8, 8)
    calls = {}
    for case in cases:
        # Right beside each other: a machine's speed drifts.
        calls[case.name] = functools.partial(_repeat, case.call, OP_CALLS)
        calls[_add(case)] = functools.partial(_repeat, lambda: torch.add(a, b), ADD_CALLS)
    checks = [Check(f"{backend}, {case.name}", case.problem) for case in cases]
    gc.collect()
    gc.disable()
    try:
        timing = time_paired(calls, checks, rounds=rounds, warmup=3, clock=time.thread_time)
    finally:
        gc.enable()
    return [
        Row(
            backend,
            case.name,
            _scaled(timing.ratio(case.name, _add(case)), ADD_CALLS / OP_CALLS),
            _scaled(timing.time(case.name), 1e6 / OP_CALLS),
        )
        for case in cases
    ]


@dataclass(frozen=True)
class StepRow:
    """Host time of a whole step's rest, in adds, and that of our calls in it: in adds, and over the rest."""

    backend: str
    name: str
    rest: Spread
    ours: Spread
    share: Spread


def measure_steps(backend: str, rounds: int, only: str = "") -> list[StepRow]:
    """Host time of every step of a backend that `host_cases.prepare` got ready."""
    a, b, rows = torch.ones(8, 8), torch.ones(8, 8), []
    # What no kernel wrote holds anything: numbers too small for a processor to be quick at, for one.
    torch.set_flush_denormal(True)
    gc.collect()
    gc.disable()
    try:
        for step in host_steps.steps(backend, only):
            calls = {
                "ours": functools.partial(_repeat, step.adapted, STEP_CALLS),
                "rest": functools.partial(_repeat, step.rest, STEP_CALLS),
                "add": functools.partial(_repeat, lambda: torch.add(a, b), ADD_CALLS),
            }
            taken = time_paired(calls, [], rounds=rounds, warmup=3, clock=time.thread_time).seconds
            adds = ADD_CALLS / STEP_CALLS
            found = [
                (adds * rest / add, adds * (whole - rest) / add, (whole - rest) / rest)
                for whole, rest, add in zip(*(taken[name] for name in calls), strict=True)
            ]
            rows.append(StepRow(backend, step.name, *map(spread, zip(*found, strict=True))))
    finally:
        gc.enable()
        torch.set_flush_denormal(False)
    return rows


def _add(case: host_cases.HostCase) -> str:
    return f"torch.add beside {case.name}"


def _repeat(call: Callable[[], object], times: int, _round: int) -> None:
    for _ in range(times):
        call()


def _scaled(times: Spread, factor: float) -> Spread:
    return Spread(*(factor * t for t in (times.p20, times.p50, times.p80)))


def _print(rows: list[Row]) -> None:
    width = max(len(row.name) for row in rows)
    print(f"{'backend':10}{'call':{width}}  {'adds':>6}  {'p20':>6}  {'p80':>6}  {'us':>7}")
    for row in rows:
        adds = "  ".join(f"{value:6.1f}" for value in (row.adds.p50, row.adds.p20, row.adds.p80))
        print(f"{row.backend:10}{row.name:{width}}  {adds}  {row.microseconds.p50:7.1f}")


def _print_steps(rows: list[StepRow]) -> None:
    for row in rows:
        share = " to ".join(f"{value:.0%}" for value in (row.share.p20, row.share.p80))
        print(
            f"{row.backend:10}a step of {row.name}: our calls {row.ours.p50:.0f} adds, the rest {row.rest.p50:.0f}: "
            f"{row.share.p50:.0%} ({share})"
        )


def _records(rows: list[Row], note: str) -> Iterator[record.Row]:
    for row in rows:
        for unit, values in (("torch.add", row.adds), ("us", row.microseconds)):
            for percentile, value in asdict(values).items():
                yield record.row(
                    f"host/{row.name}", row.backend, "", "bfloat16", f"host_{percentile}", unit, value, note
                )


def _step_records(rows: list[StepRow], note: str) -> Iterator[record.Row]:
    for row in rows:
        for name, unit, values in (
            ("rest", "torch.add", row.rest), ("ours", "torch.add", row.ours), ("ours over rest", "x", row.share),
        ):  # fmt: skip
            for percentile, value in asdict(values).items():
                op, metric = f"host/step of {row.name}", f"{name}_{percentile}"
                yield record.row(op, row.backend, "", "float32", metric, unit, value, note)
