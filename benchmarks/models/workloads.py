"""Whole training steps of published models with random weights: eager, under torch.compile, as a CUDA graph."""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch

from adamix_kernels import backends

from .. import sizes
from ..measure import clock
from ..measure.clock import Effort
from ..measure.harness import spread
from ..measure.ledger import AbsentError, BrokenDeviceError, Item, Ledger, RefusedError
from ..ops.bench import watching
from ..ops.run import BROKEN, add_run_options, open_ledger
from ..sizes import StepSize
from .agreement import agreement_problem
from .contenders import ADAMIX, LORA, ORIGINAL, PLAIN, Contender, Inputs, Workload, build, load_base

MODES = EAGER, COMPILE, GRAPH = "eager", "compile", "graph"
# Batches that the steps go through.
POOL = 4
FULL = Effort(seconds=0.5, least=7, most=41, warmup=3)


def plan(*, smoke: bool) -> Iterator[tuple[str, str, str]]:
    """(contender, backend, mode), what the goals need first; what cannot run on this machine stays in, to be told."""
    names = list(backends())
    for mode in (EAGER, GRAPH):
        yield from ((ADAMIX, name, mode) for name in names)
        yield PLAIN, "torch", mode
        if mode == EAGER:
            yield ORIGINAL, "torch", mode
    if smoke:
        yield ADAMIX, "reference", COMPILE
        return
    yield LORA, "peft", EAGER
    yield from ((ADAMIX, name, COMPILE) for name in reversed(names))
    yield PLAIN, "torch", COMPILE


def measure(
    size: StepSize, device: torch.device, ledger: Ledger, effort: Effort, *, smoke: bool, check_only: bool,
    modes: Sequence[str] = MODES, verdicts: dict[tuple[str, str], str | None] | None = None,
) -> None:  # fmt: skip
    """Fills `ledger` with one item for each contender, backend and mode of `modes`.

    verdicts: (model, backend) -> what is wrong with its step, None for nothing; checked once for all sizes of a model,
    since it is checked at a small one.

    Raises BrokenDeviceError when the GPU no longer answers this process.
    """
    workload = Workload(size.model, size.batch, size.tokens, size.experts, size.rank)
    # Millions of weights are drawn sooner by a GPU.
    with device:
        base = load_base(workload).to(device)
    batches = [_without_padding(*batch, device) for batch in workload.batches(base.config.vocab_size, POOL)]
    verdicts = {} if verdicts is None else verdicts
    dtype = "bfloat16 autocast" if device.type == "cuda" else "float32"
    for name, backend, mode in plan(smoke=smoke):
        if mode not in modes:
            continue
        item = Item(f"step/{name}/{mode}", backend, size.words, dtype)
        with ledger.item(item, "checked" if check_only else "timed") as rows:
            if rows is None:
                continue
            with watching(device):
                _require_runnable(name, backend, mode, device)
                if name == ADAMIX:
                    key = size.model, backend
                    if key not in verdicts:
                        verdicts[key] = agreement_problem(base, workload, backend)
                    problem = verdicts[key]
                    if problem is not None:
                        raise RefusedError(problem)
                rows += _run(name, backend, mode, base, workload, batches, item, effort, smoke, check_only)
        _free(device)


def _run(name, backend, mode, base, workload, batches, item, effort, smoke, check_only):
    device = next(base.parameters()).device
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    contender = build(
        name, base, workload, backend=backend if name == ADAMIX else "auto", capturable=mode == GRAPH
    )  # fmt: skip
    held = (torch.cuda.memory_allocated(device) - before) if device.type == "cuda" else 0
    if mode == GRAPH:
        torch.cuda.reset_peak_memory_stats(device)
        resting = torch.cuda.memory_allocated(device)
        step = graphed(contender, batches)
        peak = torch.cuda.max_memory_allocated(device) - resting
    else:
        step = stepper(contender, batches, compiled=mode == COMPILE, smoke=smoke)
        for k in range(effort.warmup):
            step(k)
        peak = clock.peak_bytes(step, device)
    if check_only:
        clock.synchronize(device)
        return []
    rows = []
    for percentile, seconds in asdict(spread(clock.eager_seconds(step, device, effort))).items():
        rows.append(item.row(f"time_{percentile}", "ms", 1e3 * seconds))
    if device.type == "cuda":
        rows.append(item.row("peak_memory", "MiB", peak / 2**20, "above model, experts and optimizer"))
        rows.append(item.row("model_memory", "MiB", held / 2**20, "model and experts"))
        rows.append(item.row("host_time", "ms", 1e3 * clock.host_seconds(step, device, calls=3)))
    if mode == EAGER:
        unit, metric = "calls", "launches" if device.type == "cuda" else "aten_ops"
        with contextlib.suppress(RuntimeError):
            rows.append(item.row(metric, unit, clock.launches(step, device)))
    return rows


def stepper(contender: Contender, batches, *, compiled: bool, smoke: bool) -> Callable[[int], None]:
    """step(k): forward, loss, backward, AdamW and zero_grad on batch k; the forward and loss compiled if asked."""
    loss = _autocast(contender)
    if compiled:
        loss = torch.compile(loss, dynamic=False, backend="eager" if smoke else "inductor")

    def step(k: int) -> None:
        loss(*batches[k % len(batches)]).backward()
        contender.optimizer.step()
        contender.optimizer.zero_grad()

    return step


def graphed(contender: Contender, batches) -> Callable[[int], None]:
    """step(k): batch k copied into the inputs of a CUDA graph of the whole step, optimizer included, and its replay."""
    inputs, labels = copy.deepcopy(batches[0])
    loss = _autocast(contender)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            contender.optimizer.zero_grad()
            loss(inputs, labels).backward()
            contender.optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    # The capture makes gradients of its own, which a replay overwrites.
    contender.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss(inputs, labels).backward()
        contender.optimizer.step()

    def step(k: int) -> None:
        new_inputs, new_labels = batches[k % len(batches)]
        for name, value in inputs.items():
            value.copy_(new_inputs[name])
        labels.copy_(new_labels)
        graph.replay()

    return step


def _autocast(contender: Contender) -> Callable[[Inputs, torch.Tensor], torch.Tensor]:
    device = next(contender.model.parameters()).device
    if device.type != "cuda":
        return contender.loss

    def loss(inputs, labels):
        # A cache of casts would outlive its graph.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return contender.loss(inputs, labels)

    return loss


def _require_runnable(name: str, backend: str, mode: str, device: torch.device) -> None:
    state = backends().get(backend) if name == ADAMIX else None
    if state is not None and not state.usable:
        raise AbsentError(state.reason)
    if state is not None and backend != "reference" and device.type != "cuda":
        raise AbsentError(f"backend {backend} is timed on a GPU only")
    if mode == GRAPH and device.type != "cuda":
        raise AbsentError("CUDA graphs need a GPU")


def _without_padding(inputs: Inputs, labels: torch.Tensor, device: torch.device) -> tuple[Inputs, torch.Tensor]:
    """On the device, without the mask: there is no padding, and a mask's values would be read on the CPU."""
    kept = {name: value.to(device) for name, value in inputs.items() if name != "attention_mask"}
    return kept, labels.to(device)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        if (dynamo := sys.modules.get("torch._dynamo")) is not None:
            dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def add_parser(commands) -> None:
    parser = commands.add_parser("models", help="whole training steps in every mode, on a GPU")
    every = sorted({name for models in sizes.STEPS.values() for name in models})
    parser.add_argument("names", nargs="*", help=f"of {', '.join(every)} (default: all of --size)")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=MODES, help="compile takes a minute for each model"
    )
    add_run_options(parser, sizes.STEPS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Exit status 0, also where contenders failed or were refused; 4 for a broken GPU."""
    known, smoke = sizes.STEPS[options.size], options.size == "smoke"
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        raise SystemExit(f"models: got {', '.join(unknown)}, expected {', '.join(known)} with --size {options.size}")
    ledger = open_ledger(options)
    effort = clock.SMOKE if smoke else FULL
    verdicts: dict[tuple[str, str], str | None] = {}
    try:
        for name in options.names or known:
            for size in known[name]:
                measure(
                    size, torch.device(options.device), ledger, effort, smoke=smoke, check_only=options.check_only,
                    modes=options.modes, verdicts=verdicts,
                )  # fmt: skip
    except BrokenDeviceError:
        return BROKEN
    return 0
