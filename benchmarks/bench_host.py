"""`python -m benchmarks.run host`: what a call costs on the host, in torch.add of two 8 x 8 tensors of the same run.

The tensors lie on the CPU and nothing is launched (host_driver.py). What a GPU's own calls cost beside that is not in
it: the allocator, cudaGetDevice, the driver's launch. Time is this thread's on a processor: nothing waits for anything,
and what else the machine does is not the op's.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import host_cases
from .harness import Check, RedCheckError, Spread, time_paired

# Calls of one sample, as the layers of a model follow each other: of an op, and of an add.
OP_CALLS, ADD_CALLS = 5, 20


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
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Exit status 0; 1 when a call did not launch what it should and so nothing was timed."""
    torch.set_num_threads(1)
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
        _print(rows)
    return 0


def measure(backend: str, rounds: int, only: str = "") -> list[Row]:
    """Host time of every case of a backend that `host_cases.prepare` got ready."""
    cases = [case for case in host_cases.cases(backend) if only in case.name]
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
