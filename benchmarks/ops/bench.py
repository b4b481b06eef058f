"""Runs the cases of an op: every contender checked against float64, then timed."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch

from ..measure import clock
from ..measure.ceilings import Ceilings
from ..measure.clock import Effort
from ..measure.harness import spread
from ..measure.ledger import BrokenDeviceError, Item, Ledger, describe
from ..measure.record import Row
from .cases import DIRECTIONS, Bound, Case, Contender, Draw, Inputs
from .check import gradients, require_agreement

logger = logging.getLogger(__name__)


def run_cases(
    cases: Iterable[Case],
    device: torch.device,
    ledger: Ledger,
    ceilings: Ceilings | None,
    effort: Effort,
    *,
    brief: bool = False,
) -> None:
    """Fills `ledger`. ceilings None: only check, and call everything once at its real size (which compiles it).
    brief: the kernels in every direction, everybody else in the widest alone, which speeds are compared in.

    Raises BrokenDeviceError when a kernel left the GPU unusable for this process.
    """
    for case in cases:
        if ceilings is not None:
            ledger.add(_floors(case, ceilings))
        inputs: list[Inputs] = []
        for contender in case.contenders:
            item = Item(case.op, contender.name, case.shape, str(case.dtype).removeprefix("torch."))
            with ledger.item(item, "checked" if ceilings is None else "timed") as rows:
                if rows is None:
                    continue
                with watching(device):
                    both_ways, binder = "both" in case.traffic, contender.open()
                    error = require_agreement(case, contender, binder, device, both_ways)
                    rows.append(item.row("error", "x", error, "of what the formula errs in the same dtype"))
                    inputs = inputs or _sets(case, device, timed=ceilings is not None)
                    calls = _Calls(contender, binder, inputs, both_ways)
                    if ceilings is None:
                        calls.direction(DIRECTIONS[2] if both_ways else DIRECTIONS[0])(0)
                        continue
                    for direction in list(case.traffic)[-1 if brief and not _is_kernel(contender) else 0 :]:
                        try:
                            rows += _measure(item, direction, calls, case, device, ceilings, effort, contender.graph)
                        except torch.OutOfMemoryError as failed:
                            # A backward on its own keeps every forward; the others do not.
                            calls.done()
                            rows.append(item.row("out_of_memory", "", 1, describe(failed), op=f"{case.op}/{direction}"))
                            free(device)
            free(device)
        del inputs
        free(device)


def _is_kernel(contender: Contender) -> bool:
    return contender.exacting and contender.name != "reference"


class _Calls:
    """The directions of a contender on rotating inputs, each a function of k."""

    def __init__(self, contender: Contender, binder: Callable[[Inputs], Bound], inputs: list[Inputs], both_ways: bool):
        narrow = contender.narrow or (lambda one: one)
        self._grads = [one.grad for one in inputs]
        self._bound = [binder(fresh_leaves(narrow(one), both_ways)) for one in inputs]
        self._grad_enabled = both_ways
        self._outs: list | None = None

    @property
    def sets(self) -> int:
        return len(self._bound)

    def direction(self, name: str) -> Callable[[int], object]:
        """forward, with what the backward needs; backward, again and again from one forward; both."""
        if name == "forward":
            return self._forward
        if name == "both":
            return self._both
        self._outs = [self._forward(k) for k in range(self.sets)]
        return self._backward

    def done(self) -> None:
        """Lets go of what `backward` kept."""
        self._outs = None

    def _forward(self, k: int) -> object:
        with torch.set_grad_enabled(self._grad_enabled):
            return self._bound[k % self.sets].call()

    def _both(self, k: int) -> object:
        bound: Bound = self._bound[k % self.sets]
        return gradients(bound, self._grads[k % self.sets], bound.call())

    def _backward(self, k: int) -> object:
        k %= self.sets
        return gradients(self._bound[k], self._grads[k], self._outs[k], retain=True)


def _measure(
    item: Item, direction: str, calls: _Calls, case: Case, device: torch.device, ceilings: Ceilings, effort: Effort,
    graph: bool,
) -> list[Row]:  # fmt: skip
    op = f"{case.op}/{direction}"
    # A backward runs on the streams of its forward: a stream that captures needs a forward of its own.
    call = calls.direction(direction)
    rows = []

    def add(metric: str, unit: str, value: float | None, note: str = "") -> None:
        if value is not None:
            rows.append(item.row(metric, unit, value, note, op=op))

    eager = spread(clock.eager_seconds(call, device, effort))
    for percentile, seconds in asdict(eager).items():
        add(f"time_{percentile}", "us", 1e6 * seconds)
    best, how = eager.p50, "eager"
    peak = clock.peak_bytes(call, device)
    add("peak_memory", "MiB", None if peak is None else peak / 2**20)
    if device.type == "cuda":
        calls_on_end = max(3, min(20, int(0.05 / best)))
        add("host_time", "us", 1e6 * clock.host_seconds(call, device, calls_on_end))
    if device.type == "cuda" or direction != "backward":
        try:
            add("launches" if device.type == "cuda" else "aten_ops", "calls", clock.launches(call, device))
        except Exception as error:
            add("launches_failed", "", 1, describe(error))
    if graph and device.type == "cuda":
        try:
            replayed = spread(_graph_seconds(calls, direction, effort))
        except Exception as error:
            add("graph_failed", "", 1, describe(error))
            clock.require_working(device)
        else:
            for percentile, seconds in asdict(replayed).items():
                add(f"graph_time_{percentile}", "us", 1e6 * seconds)
            best, how = replayed.p50, "replayed from a CUDA graph"
    calls.done()
    moved, operations = case.traffic[direction], case.operations.get(direction, 0.0)
    floor = ceilings.floor(moved, operations, case.dtype)
    add("bandwidth", "GB/s", moved / best / 1e9, how)
    if operations:
        add("throughput", "TFLOP/s", operations / best / 1e12, how)
    add("copy_share", "1", moved / best / ceilings.copy, how)
    add("floor_share", "1", floor / best, how)
    return rows


def _graph_seconds(calls: _Calls, direction: str, effort: Effort) -> list[float]:
    if direction != "backward":
        return clock.graph_seconds(calls.direction(direction), calls.sets, effort)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = calls.direction(direction)
        return clock.graph_seconds(call, calls.sets, effort, stream=stream)


def _floors(case: Case, ceilings: Ceilings) -> list[Row]:
    rows = []
    for direction, moved in case.traffic.items():
        item = Item(f"{case.op}/{direction}", "floor", case.shape, str(case.dtype).removeprefix("torch."))
        operations = case.operations.get(direction, 0.0)
        note = f"{moved:.4g} bytes, {operations:.4g} operations"
        rows.append(item.row("floor", "us", 1e6 * ceilings.floor(moved, operations, case.dtype), note))
    return rows


def _sets(case: Case, device: torch.device, *, timed: bool) -> list[Inputs]:
    first = case.make(Draw(device, case.dtype, seed=2))
    if not timed:
        return [first]
    count = clock.rotation(clock.nbytes((*first.leaves, *first.extra, first.grad)), device)
    return [first, *(case.make(Draw(device, case.dtype, seed=2 + k)) for k in range(1, count))]


def fresh_leaves(inputs: Inputs, wanted: bool) -> Inputs:
    leaves = tuple(t.detach().requires_grad_(wanted) for t in inputs.leaves)
    return Inputs(leaves, inputs.extra, inputs.grad)


class watching:
    """Turns an error inside into BrokenDeviceError when the GPU no longer answers."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        try:
            clock.require_working(self.device)
        except RuntimeError as broken:
            raise BrokenDeviceError(describe(error or broken)) from (error or broken)


def free(device: torch.device) -> None:
    """Memory of the contender before: its tensors, and what torch.compile holds."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
