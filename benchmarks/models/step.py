"""One training step on a real encoder: AdaMix against a single adapter, the published way and PEFT LoRA."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import ROOT
from ..measure.goals import CPU_LIMITS
from ..measure.harness import Check, Timing, time_paired
from ..measure.record import Row, row, version
from .agreement import agreement_problem
from .contenders import ADAMIX, BACKENDS, TITLES, Workload, build, load_base

logger = logging.getLogger(__name__)

DTYPE = "float32"
# Batches that the rounds go through; the calls of one round share a batch.
POOL = 8
MEMORY_STEPS = 4


@dataclass(frozen=True)
class Goal:
    """The AdaMix step takes at most `limit` times the step of `other`."""

    other: str
    limit: float

    def verdict(self, ratio: float) -> str:
        """met or missed in words, from the median ratio."""
        if ratio <= self.limit:
            return f"met (at most {self.limit:.2f}x)"
        return f"missed by {ratio / self.limit - 1:.1%} (at most {self.limit:.2f}x)"


def goals(workload: Workload) -> tuple[Goal, ...]:
    """The goals that are set for this size; none for a random model or another size."""
    if workload.model == "tiny":
        return ()
    return tuple(Goal(*pair) for pair in CPU_LIMITS.get((workload.batch, workload.tokens), {}).items())


@dataclass(frozen=True)
class Result:
    """timing of each contender; peak memory of a step in MiB, where it could be measured; why others are absent."""

    workload: Workload
    threads: int
    timing: Timing
    memory: dict[str, float]
    absent: dict[str, str]
    note: str


def measure(
    workload: Workload,
    *,
    threads: int = 2,
    rounds: int | None = None,
    seconds: float = 120.0,
    memory: bool = True,
    check: Callable[..., str | None] = agreement_problem,
) -> Result:
    """Checks, then times the steps in interleaved rounds.

    workload: sizes. threads: of torch. rounds: how many, None for what fits into `seconds`. memory: also
    measure each contender's peak in a process of its own. check: see agreement_problem.

    Raises RedCheckError, with nothing timed, when the AdaMix step and the published way disagree.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        base = load_base(workload)
        batches = workload.batches(base.config.vocab_size, POOL)
        steps, absent = {}, {}
        for name in TITLES:
            try:
                step = build(name, base, workload).step
            except ImportError as error:
                absent[name] = str(error)
                continue
            steps[name] = lambda k, step=step: step(*batches[k % POOL])
        checks = [Check("AdaMix step agrees with the published way", lambda: check(base, workload))]
        load = os.getloadavg()[0]
        timing = time_paired(steps, checks, rounds=rounds, seconds=seconds)
    finally:
        torch.set_num_threads(before)
    peaks = {name: peak for name in steps if memory and (peak := _peak_in_subprocess(name, workload, threads))}
    note = f"threads={threads} rounds={timing.rounds} load_before={load:.2f} transformers={version('transformers')}"
    return Result(workload, threads, timing, peaks, absent, note)


def rows(result: Result) -> list[Row]:
    """Times in ms, ratios of the AdaMix step to the others, the goals for them, and peaks in MiB."""
    shape, timing = result.workload.shape, result.timing
    made = []

    def add(name: str, metric: str, unit: str, value: float) -> None:
        made.append(row(f"step/{name}", BACKENDS[name], shape, DTYPE, metric, unit, value, result.note))

    for name in timing.seconds:
        for percentile, value in asdict(timing.time(name)).items():
            add(name, f"time_{percentile}", "ms", 1e3 * value)
        if name in result.memory:
            add(name, "peak_memory", "MiB", result.memory[name])
        if name != ADAMIX:
            for percentile, value in asdict(timing.ratio(ADAMIX, name)).items():
                add(ADAMIX, f"ratio_{percentile} to step/{name}", "x", value)
    for goal in goals(result.workload):
        add(ADAMIX, f"ratio_goal to step/{goal.other}", "x", goal.limit)
    return made


def table(result: Result) -> tuple[str, list[str], list[list[str]]]:
    """(title, header, lines) for people."""
    wanted = {goal.other: goal for goal in goals(result.workload)}
    lines = []
    for name in result.timing.seconds:
        time, verdict, ratio_text = result.timing.time(name), "", ""
        if name != ADAMIX:
            ratio = result.timing.ratio(ADAMIX, name)
            ratio_text = f"{ratio.p50:.3f}x ({ratio.p20:.3f} to {ratio.p80:.3f})"
            verdict = wanted[name].verdict(ratio.p50) if name in wanted else "no goal"
        peak = f"{result.memory[name]:.0f}" if name in result.memory else "not measured"
        lines.append([TITLES[name], f"{1e3 * time.p50:.1f}", ratio_text, verdict, peak])
    lines += [[TITLES[name], "absent", "", reason, ""] for name, reason in result.absent.items()]
    header = ["step", "ms (median)", "AdaMix / this (p20 to p80)", "goal", "peak MiB"]
    return f"{result.workload.shape}, {result.note}", header, lines


def peak_memory(name: str, workload: Workload, threads: int) -> float | None:
    """MiB by which the resident memory of THIS process peaks above its level before the first step.

    Meant for a fresh process; needs Linux, which can reset a process's peak. None elsewhere.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    torch.set_num_threads(threads)
    base = load_base(workload)
    contender = build(name, base, workload)
    batches = workload.batches(base.config.vocab_size, POOL)
    try:
        reset.write_text("5")
    except OSError:
        return None
    idle = _status_kib("VmRSS")
    for k in range(MEMORY_STEPS):
        contender.step(*batches[k])
    return (_status_kib("VmHWM") - idle) / 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _peak_in_subprocess(name: str, workload: Workload, threads: int) -> float | None:
    options = [f"--{key}={value}" for key, value in asdict(workload).items()]
    command = [sys.executable, "-m", "benchmarks.run", "step-memory", name, f"--threads={threads}", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        logger.warning("peak memory of %s not measured: %s", name, done.stderr.strip().splitlines()[-1:])
        return None
    return float(done.stdout.split()[-1]) if done.stdout.strip() else None
