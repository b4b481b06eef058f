"""The layer and the decoded token by a device's own clock, eager and replayed; every way is checked, then timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict

import torch

from adamix_kernels import AdaMixConfig, backends

from .. import sizes
from ..measure import clock, record
from ..measure.harness import spread
from ..measure.ledger import AbsentError, BrokenDeviceError, Item, Ledger, RefusedError, describe
from ..ops.bench import watching
from ..ops.cases import require_usable
from ..ops.check import disagreement
from ..ops.run import BROKEN, open_ledger
from ..sizes import DecodeSize, MixtureSize
from .decoding import configurations, decoder, prompt, step_of
from .layer import PEERS, Layer, Way, ours, ways, wrong

# What waits for the GPU cannot be held by a CUDA graph: torch.where's rows.
EAGER_ONLY = ("loop",)


def measure_layer(size: MixtureSize, device: torch.device, ledger: Ledger, *, smoke: bool, check_only: bool) -> None:
    """Rows of mixture/forward and mixture/both for every way, microseconds a call on layers that rotate."""
    dtype = getattr(torch, size.dtype)
    effort = clock.SMOKE if smoke else clock.FULL
    first = Layer(*size.dimensions, size.kind, device=device, dtype=dtype)
    count = 1 if check_only else clock.rotation(clock.nbytes([first.x, first.x, first.a, first.b]), device)
    layers = [first, *(Layer(*size.dimensions, size.kind, device=device, dtype=dtype, seed=k) for k in range(1, count))]
    peers: list[dict[str, Way]] = []
    for name in (*backends(), *PEERS[size.kind]):
        item = Item("mixture", name, size.words, size.dtype)
        with ledger.item(item, "checked" if check_only else "timed") as rows:
            if rows is None:
                continue
            mine = name in backends()
            if mine:
                require_usable(name, "gated_lora", device)
                called = [ours(name)] * len(layers)
            else:
                # What a peer's version does not do is its own loss.
                peers = peers or [ways(layer) for layer in layers]
                if name not in peers[0]:
                    raise AbsentError("not installed, or not in this version")
                called = [every[name] for every in peers]
            with watching(device):
                problem = wrong(called[0], first, peer=not mine)
                if problem is not None:
                    raise RefusedError(problem)
                pairs = list(zip(called, layers))
                if not check_only:
                    graph = device.type == "cuda" and name not in EAGER_ONLY
                    for direction, call in (("forward", _forward(pairs)), ("both", _both(pairs))):
                        rows += _timed(item, f"mixture/{direction}", call, count, device, effort, graph)


def _forward(pairs: list) -> clock.Call:
    def call(k: int) -> object:
        way, layer = pairs[k % len(pairs)]
        return way(layer)

    return call


def _both(pairs: list) -> clock.Call:
    grads = [torch.randn_like(layer.x) for _, layer in pairs]

    def call(k: int) -> object:
        k %= len(pairs)
        way, layer = pairs[k]
        return torch.autograd.grad(way(layer), layer.leaves(), grads[k], allow_unused=True)

    return call


def measure_decoding(size: DecodeSize, device: torch.device, ledger: Ledger, *, smoke: bool, check_only: bool) -> None:
    """Rows of decode/base and of decode/<configuration> for every backend, milliseconds a token."""
    dtype = getattr(torch, size.dtype)
    effort = clock.SMOKE if smoke else clock.Effort(0.5, 11, 61)
    pairs: list[tuple[str, AdaMixConfig | None, str]] = [("base", None, "torch")]
    pairs += [(name, config, backend) for name, config in configurations().items() for backend in backends()]
    for name, config, backend in pairs:
        item = Item(f"decode/{name}", backend, size.words, size.dtype)
        with ledger.item(item, "checked" if check_only else "timed") as rows:
            if rows is None:
                continue
            if config is not None:
                require_usable(backend, "gated_lora", device)
            with watching(device), torch.no_grad():
                ids = prompt(device)
                model = decoder(config, size.width, device=device, backend=backend if config else "auto")
                if config is not None:
                    found = step_of(model, ids)(0)
                    plain = decoder(config, size.width, device=device, backend="reference")
                    own = step_of(plain, ids)(0)
                    problem = disagreement(found, step_of(plain.double(), ids)(0), own)
                    if problem is not None:
                        raise RefusedError(problem)
                model = model.to(dtype)
                step = step_of(model, ids)
                step(0)
                if not check_only:
                    graph = device.type == "cuda"
                    rows += _timed(item, item.op, step, 1, device, effort, graph, 1e3, "ms")


def _timed(
    item: Item, op: str, call: Callable[[int], object], sets: int, device: torch.device, effort: clock.Effort,
    graph: bool, times: float = 1e6, unit: str = "us",
) -> list[record.Row]:  # fmt: skip
    rows = []

    def add(metric: str, of: str, value: float, note: str = "") -> None:
        rows.append(item.row(metric, of, value, note, op=op))

    def add_times(seconds: list[float], prefix: str = "") -> None:
        for percentile, value in asdict(spread(seconds)).items():
            add(f"{prefix}time_{percentile}", unit, times * value)

    add_times(clock.eager_seconds(call, device, effort))
    if device.type == "cuda":
        add("host_time", unit, times * clock.host_seconds(call, device, calls=5))
        add("peak_memory", "MiB", (clock.peak_bytes(call, device) or 0) / 2**20)
    try:
        add("launches" if device.type == "cuda" else "aten_ops", "calls", clock.launches(call, device))
    except Exception as error:
        add("launches_failed", "", 1, describe(error))
    if graph:
        try:
            add_times(clock.graph_seconds(call, sets, effort), "graph_")
        except Exception as error:
            add("graph_failed", "", 1, describe(error))
            clock.require_working(device)
    return rows


def run(options: argparse.Namespace) -> int:
    """Exit status 0, also where ways failed or were refused; 4 for a broken GPU."""
    ledger, device = open_ledger(options), torch.device(options.device)
    how = dict(smoke=options.size == "smoke", check_only=options.check_only)
    try:
        for size in sizes.MIXTURE[options.size]:
            measure_layer(size, device, ledger, **how)
        for decoded in sizes.DECODE[options.size]:
            measure_decoding(decoded, device, ledger, **how)
    except BrokenDeviceError:
        return BROKEN
    return 0
