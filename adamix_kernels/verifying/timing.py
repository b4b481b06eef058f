"""ADAMIX_AUTO=time: kernels against each other on this device, and when a faster one takes the table's place.

Times are noise to a few per cent, and what is within the noise may come out differently in every process; so the
table's choice stays unless it is beaten by more than 5% and by more than three times the spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .cases import cases
from .checks import Check
from .machine import Job, Machine

# Rounds in which every contender runs once, and buffers whose inputs take turns so that none is in a cache.
ROUNDS, BUFFERS, BYTES = 15, 8, 128 << 20
BEATEN_BY, SPREADS = 0.05, 3.0


class Time(NamedTuple):
    """Seconds a call: the median of the rounds, and half of what lies between their quartiles."""

    median: float
    spread: float


def measured(seconds: Sequence[float]) -> Time:
    """What rounds tell."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return Time(median, (high - low) / 2)


def fastest(first: str, times: Mapping[str, Time]) -> str:
    """`first`, the table's choice, unless another beats it by BEATEN_BY and by SPREADS times the larger spread."""
    if first not in times:
        return first
    best = min(times, key=lambda name: times[name].median)
    won = times[first].median - times[best].median
    spread = max(times[first].spread, times[best].spread)
    return best if won > BEATEN_BY * times[first].median and won > SPREADS * spread else first


def time_job(job: Job, machine: Machine, begin: Callable[[str], None]) -> dict[str, Any]:
    """{"state": "timed", "why": {backend: (median, spread)}} of forward and backward; job.backend: "a+b+c"."""
    device = machine.torch_device
    large = [case for case in cases(job.op, job.shape) if case.large or device.type != "cuda"]
    case = (large or list(cases(job.op, job.shape)))[0]
    names, done = job.backend.split("+"), 0
    check = Check(case, device, job.torch_dtype, 0)
    size = sum(t.numel() * t.itemsize for t in check.exact)
    buffers = BUFFERS if device.type != "cuda" else max(BUFFERS, min(256, BYTES // max(1, size)))
    begin(f"timing {', '.join(names)}")
    calls = {name: [check.call(name) for _ in range(buffers)] for name in names}
    for name in names:
        calls[name][0]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(ROUNDS):
        # Everybody is first as often.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(_seconds(calls[name], device))
            done += 1
    return {"state": "timed", "why": {name: measured(seconds[name]) for name in names}, "cases": done}


def _seconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Of a call, over one on each of the buffers."""
    if device.type != "cuda":
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) / len(calls)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    stop.record()
    stop.synchronize()
    elapsed: float = start.elapsed_time(stop)
    return elapsed / 1000 / len(calls)
