"""Serving after merging: merged LoRA against the bare model, the merged adapter against one fused by hand."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import nn

from adamix_kernels import AdaMixConfig, adapt, backends, merge, unmerge

from .. import sizes
from ..measure import clock
from ..measure.harness import spread
from ..measure.ledger import AbsentError, BrokenDeviceError, Item, Ledger, RefusedError, describe
from ..ops.bench import watching
from ..ops.check import disagreement
from ..ops.run import BROKEN, add_run_options, open_ledger
from ..sizes import StepSize
from .contenders import Workload, load_base

POOL = 4


class WrittenOut(nn.Module):
    """The formula of HandFused in four plain calls, to check it by."""

    def __init__(self, fused: HandFused):
        super().__init__()
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.fused
        out = own.base(x)
        return out + F.linear(F.gelu(F.linear(out, own.down, own.down_bias)), own.up, own.up_bias)


class HandFused(nn.Module):
    """x + gelu(x Wd^T + bd) Wu^T + bu behind `base` in as few calls as PyTorch allows."""

    def __init__(self, base: nn.Module, down: nn.Parameter, down_bias, up: nn.Parameter, up_bias):
        super().__init__()
        self.base = base
        self.down, self.down_bias, self.up, self.up_bias = down, down_bias, up, up_bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        flat = out.view(-1, out.shape[-1])
        h = F.gelu(torch.addmm(self.down_bias, flat, self.down.t()))
        return torch.addmm(flat, h, self.up.t()).add_(self.up_bias).view(out.shape)


def contenders(workload: Workload, device: torch.device) -> dict[tuple[str, str], Callable[[], nn.Module]]:
    """(op, backend) -> a function that builds the model; pairs that a goal compares hold the same weights."""
    with device:
        base = load_base(workload).to(device)
    made: dict[tuple[str, str], Callable[[], nn.Module]] = {
        ("inference/base", "torch"): lambda: copy.deepcopy(base),
        ("inference/merged_lora", "torch"): lambda: merge(_adapted(base, workload, "lora", "auto")),
        ("inference/hand_fused_adapter", "torch"): lambda: _hand_fused(_adapted(base, workload, "adapter", "auto")),
    }
    for name, state in backends().items():

        def adapter(name=name, state=state):
            if not state.usable:
                raise AbsentError(state.reason)
            if name != "reference" and device.type != "cuda":
                raise AbsentError(f"backend {name} is timed on a GPU only")
            return merge(_adapted(base, workload, "adapter", name))

        made["inference/merged_adapter", name] = adapter
    return made


def measure(size: StepSize, device: torch.device, ledger: Ledger, *, smoke: bool, check_only: bool) -> None:
    """Checks and times every contender's forward, eager and replayed."""
    workload = Workload(size.model, size.batch, size.tokens, size.experts, size.rank)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    effort = clock.SMOKE if smoke else clock.Effort(0.5, 11, 61)
    for (op, backend), make in contenders(workload, device).items():
        item = Item(op, backend, size.words, str(dtype).removeprefix("torch."))
        with ledger.item(item, "checked" if check_only else "timed") as rows:
            if rows is None:
                continue
            with watching(device), torch.no_grad():
                model = make().eval()
                vocab = model.config.vocab_size
                batches = [inputs["input_ids"].to(device) for inputs, _ in workload.batches(vocab, POOL)]
                _require_agreement(op, model, batches[0][:2])
                model = model.to(dtype)
                if not check_only:
                    rows += _timed(item, model, batches, device, effort)


def _timed(item: Item, model: nn.Module, batches, device: torch.device, effort: clock.Effort):
    def call(k: int):
        return model(input_ids=batches[k % len(batches)]).logits

    rows = []

    def add(seconds: list[float], prefix: str = "") -> None:
        for percentile, value in asdict(spread(seconds)).items():
            rows.append(item.row(f"{prefix}time_{percentile}", "ms", 1e3 * value))

    add(clock.eager_seconds(call, device, effort))
    if device.type == "cuda":
        rows.append(item.row("host_time", "ms", 1e3 * clock.host_seconds(call, device, calls=5)))
        rows.append(item.row("peak_memory", "MiB", clock.peak_bytes(call, device) / 2**20))
        try:
            add(clock.graph_seconds(call, len(batches), effort), "graph_")
        except Exception as error:
            rows.append(item.row("graph_failed", "", 1, describe(error)))
            clock.require_working(device)
    return rows


def _require_agreement(op: str, model: nn.Module, ids: torch.Tensor) -> None:
    """In float32, against float64: merged LoRA against factors merged on the fly, each adapter against the other."""
    if op == "inference/base":
        return
    found = model(input_ids=ids).logits
    plain = copy.deepcopy(model)
    if op == "inference/merged_lora":
        unmerge(plain)
    elif op == "inference/merged_adapter":
        _hand_fused(plain)
    else:
        _written_out(plain)
    own = plain(input_ids=ids).logits
    problem = disagreement(found, plain.double()(input_ids=ids).logits, own)
    if problem is not None:
        raise RefusedError(problem)


def _adapted(base: nn.Module, workload: Workload, method: str, backend: str) -> nn.Module:
    """Adapted, with experts that differ and do something."""
    config = AdaMixConfig(
        method=method, num_experts=workload.experts, bottleneck=workload.bottleneck, r=workload.bottleneck, dropout=0.0
    )
    model = adapt(copy.deepcopy(base), config, backend=backend)
    generator = torch.Generator(next(base.parameters()).device).manual_seed(workload.seed)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 3:
            parameter.data.normal_(std=0.02, generator=generator)
    return model


def _hand_fused(model: nn.Module) -> nn.Module:
    """The model with every adapter merged, and written out by hand."""
    if not model.adamix.merged:
        merge(model)
    for path in model.adamix.paths:
        layer = model.get_submodule(path)
        banks = [nn.Parameter(bank[0].detach().clone()) for bank in layer.adapter.banks()]
        model.set_submodule(path, HandFused(layer.base, *banks))
    return model


def _written_out(model: nn.Module) -> None:
    for path in model.adamix.paths:
        model.set_submodule(path, WrittenOut(model.get_submodule(path)))


def add_parser(commands) -> None:
    parser = commands.add_parser("inference", help="merged models against the bare one and a hand-fused adapter")
    add_run_options(parser, sizes.INFERENCE)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Exit status 0, also where contenders failed or were refused; 4 for a broken GPU."""
    ledger, device = open_ledger(options), torch.device(options.device)
    try:
        for size in sizes.INFERENCE[options.size]:
            measure(size, device, ledger, smoke=options.size == "smoke", check_only=options.check_only)
    except BrokenDeviceError:
        return BROKEN
    return 0
