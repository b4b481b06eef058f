"""`python -m benchmarks.run paired consistency`: how many times as fast as its peers an op is, on one core of a CPU.

`run op` times one contender after the other, which a busy machine tells apart from each other by its load. Here they
take turns, call by call, in processor time, and every ratio is of neighbours. Small calls run many times on end, so
that each finds its code in the caches; with --cold none does, as in a training, where other work comes between.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from ..measure import record
from ..measure.harness import Check, RedCheckError, Timing, time_paired
from ..measure.ledger import AbsentError
from .bench import fresh_leaves
from .cases import Bound, Case, Draw, Inputs, tensors
from .check import gradients
from .run import OPS

# Seconds of one sample, at least: small calls are repeated.
SAMPLE = 2e-3


def add_parser(commands) -> None:
    parser = commands.add_parser("paired", help="one op against its peers on the CPU, in turns")
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--size", choices=("cpu", "smoke"), default="cpu")
    parser.add_argument("--only", default="", help="cases whose op and shape hold this, as in 'adamix_loss 2x64x2'")
    parser.add_argument("--rounds", type=int, help="samples of every contender (default: what fits into --seconds)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a case")
    parser.add_argument("--cold", action="store_true", help="one call a sample, after other work: as in a training")
    parser.add_argument("--out", type=Path, help="CSV to write; rows of other cases in it stay")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Exit status 0; 1 when results differ, or no case has the name, and so nothing was timed."""
    torch.set_num_threads(1)
    device, found = torch.device("cpu"), 0
    for case in importlib.import_module(f"benchmarks.ops.{options.op}").cases(options.size, device):
        if options.only not in f"{case.op} {case.shape}":
            continue
        found += 1
        try:
            timing = measure(case, device, options.rounds, options.seconds, options.cold)
        except RedCheckError as error:
            print(f"paired: {error}", file=sys.stderr)
            return 1
        print(f"{case.op}, {case.shape}: {timing.time('reference').p50 * 1e6:.0f} us, {timing.rounds} rounds")
        for name in timing.seconds:
            if name != "reference":
                ratio = timing.ratio(name, "reference")
                print(f"    {name:24} {ratio.p50:5.2f}x ({ratio.p20:.2f} to {ratio.p80:.2f})")
        if options.out is not None:
            _keep(options.out, rows(case, timing, options.cold))
    if not found:
        print(f"paired: no case's name holds {options.only!r}", file=sys.stderr)
    return 0 if found else 1


def measure(case: Case, device: torch.device, rounds: int | None, seconds: float, cold: bool = False) -> Timing:
    """Of every contender that this machine has: forward, and backward where the case has one. Times are a call's.

    cold: other work (`_other_work`) has the caches before every sample, which is one call.
    """
    made, backward = case.make(Draw(device, case.dtype, seed=2)), "both" in case.traffic
    results: dict[str, tuple[torch.Tensor, ...]] = {}
    whole: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {}
    for contender in case.contenders:
        inputs = fresh_leaves(contender.narrow(made) if contender.narrow else made, backward)
        try:
            call = _whole(contender.open()(inputs), inputs, backward)
            result = call()
        except (AbsentError, ImportError):
            continue
        if contender.plain is None and contender.narrow is None:
            results[contender.name] = result
        whole[contender.name] = call
    # As often for all: what runs on right after itself finds its code in the caches.
    repeats = 1 if cold else max(map(_repeats, whole.values()))
    calls = {name: functools.partial(_repeat, call, repeats) for name, call in whole.items()}
    wanted = results["reference"]
    checks = [
        Check(f"{case.op}, {case.shape}, {name}", functools.partial(_problem, found, wanted))
        for name, found in results.items()
    ]
    other = {"between": _other_work()} if cold else {}
    timing = time_paired(calls, checks, rounds=rounds, seconds=seconds, clock=time.thread_time, **other)
    return Timing({name: [taken / repeats for taken in all_of_it] for name, all_of_it in timing.seconds.items()})


def rows(case: Case, timing: Timing, cold: bool = False) -> list[record.Row]:
    """Ours in microseconds, and over each contender's of the same round ("ratio_p50 to formula"), with their spread."""
    dtype = str(case.dtype).removeprefix("torch.")
    note = f"one thread's time, rounds={timing.rounds}{' cold' if cold else ''}"

    def row(metric: str, unit: str, value: float) -> record.Row:
        return record.row(case.op, "reference", case.shape, dtype, metric, unit, value, note)

    made = [row(f"time_{p}", "us", 1e6 * value) for p, value in asdict(timing.time("reference")).items()]
    for name in timing.seconds:
        if name != "reference":
            ratio = asdict(timing.ratio("reference", name))
            made += [row(f"ratio_{p} to {name}", "x", value) for p, value in ratio.items()]
    return made


def _keep(path: Path, new: list[record.Row]) -> None:
    """In `path`, in the place of what it has of the same case."""
    cases = {(r.op, r.shape, r.dtype) for r in new}
    old = record.read(path) if path.exists() else []
    record.write(path, [r for r in old if (r.op, r.shape, r.dtype) not in cases] + new)


def _other_work() -> Callable[[], None]:
    """A step of a small encoder layer, and a pass over 8 MB: neither code nor data of an earlier call stays near."""
    layer, x = torch.nn.TransformerEncoderLayer(128, 4, 256, batch_first=True), torch.randn(4, 32, 128)
    memory = torch.zeros(2**21)

    def work() -> None:
        memory.add_(1)
        layer(x).sum().backward()

    return work


def _whole(bound: Bound, inputs: Inputs, backward: bool) -> Callable[[], tuple[torch.Tensor, ...]]:
    def call() -> tuple[torch.Tensor, ...]:
        out = bound.call()
        return (*tensors(out), *(gradients(bound, inputs.grad, out) if backward else ()))

    return call


def _repeat(call: Callable[[], object], times: int, _round: int) -> None:
    for _ in range(times):
        call()


def _repeats(call: Callable[[], object]) -> int:
    """Calls of one sample, by the quickest of three."""
    taken = []
    for _ in range(3):
        began = time.thread_time()
        call()
        taken.append(time.thread_time() - began)
    return max(1, int(SAMPLE / max(min(taken), 1e-6)))


def _problem(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> str | None:
    """Whether results are close; their errors against float64 are what `run op` looks at."""
    for n, (one, other) in enumerate(zip(found, wanted, strict=True)):
        largest = other.abs().max().item() if other.numel() else 0.0
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-4 * largest):
            return f"result {n} is not the reference's"
    return None
