"""What one name of a pack in training owns: its layers and heads, its optimizer, its schedule and its counters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .._extras import needed
from ..models.inject import build_layers
from ..models.state import AdaMixState, replace_module
from ..models.targets import saved_modules
from ..modules import AdaptedLayer, RoutedLoRALinear
from ..routing import Router, process_rank
from .banks import Cut, TrainedBank, cuts
from .heads import check_untied
from .job import PackJob
from .mix import Block, generator_of
from .slots import RoutedLayer

_UNDECAYED = (nn.LayerNorm, nn.GroupNorm)


class PackStep(NamedTuple):
    """One name's update. loss = cross_entropy + consistency_weight * consistency, means over the name's targets, and
    grad_norm, before clipping (None where nothing is clipped): tensors [], on the device. lr: that it was made with.
    step: updates so far."""

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    consistency: torch.Tensor
    grad_norm: torch.Tensor | None
    lr: float
    step: int


def processes() -> int:
    """How many there are in torch.distributed, 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Own:
    """Attributes: name, slot, job. layers, heads: by path, the name's own parameters, which the banks hold a copy of.
    state: what adapt() would leave on a model of this name alone. steps: updates. rows: since the last update."""

    def __init__(self, name: str, slot: int, job: PackJob, model: nn.Module, backend: str):
        """model: the bare base, which stays as it is. What is drawn is what adapt() draws after manual_seed(seed)."""
        self.name, self.slot, self.job = name, slot, job
        gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(list(gpus)):
            torch.manual_seed(job.seed)
            router = Router(job.config.routing, job.config.passes)
            self.layers: dict[str, RoutedLayer] = build_layers(model, job.config, router, backend)
            whole = saved_modules(model, job.config.modules_to_save, job.config.task_type)
            for path, _ in whole:
                check_untied(model, path)
            self.heads = {path: _own_head(model, module) for path, module in whole}
            if job.labels is not None:
                self._set_labels(model, len(job.labels))
        held = f"the name {name!r} of a PackTrainer"
        self.state = AdaMixState(job.config, router, list(self.layers), list(self.heads), held=held)
        config = getattr(model, "config", None)
        labels = getattr(config, "num_labels", None) if job.labels is None else len(job.labels)
        problem = job.problem or (None if job.labels is not None else getattr(config, "problem_type", None))
        self.labels = SimpleNamespace(problem_type=problem, num_labels=labels)
        self.cuts: list[Cut] = []
        self.optimizer, self.scheduler = self._optimizer()
        self.steps, self.paused = 0, False
        self.forget()

    def _set_labels(self, model: nn.Module, labels: int) -> None:
        """The last linear layer of the heads gets `labels` rows."""
        linears = [(p, n, m) for p, h in self.heads.items() for n, m in h.named_modules() if type(m) is nn.Linear]
        if not linears:
            raise ValueError(f"labels: got {labels} for a job without a head of its own, expected None")
        path, inner, last = linears[-1]
        if last.out_features == labels:
            return
        new = nn.Linear(
            last.in_features, labels, last.bias is not None, device=last.weight.device, dtype=last.weight.dtype
        )
        init = getattr(model, "_init_weights", None)
        if init is not None:
            init(new)
        if inner:
            replace_module(self.heads[path], inner, new)
        else:
            self.heads[path] = new

    def _optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        with needed("PackTrainer"):
            from transformers import get_scheduler

        job = self.job
        plain: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        adapted = [layer.adapter if isinstance(layer, AdaptedLayer) else layer for layer in self.layers.values()]
        for part in (*adapted, *(part for head in self.heads.values() for part in head.modules())):
            for key, parameter in part.named_parameters(recurse=False):
                if parameter.requires_grad:
                    free = isinstance(part, _UNDECAYED) or "bias" in key
                    (plain if free else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": job.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=job.lr, betas=job.betas, eps=job.eps
        )
        return optimizer, get_scheduler(job.schedule, optimizer, job.warmup_steps, job.total_steps)

    def parameters(self) -> list[torch.Tensor]:
        """What is trained, in the optimizer's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def enter(self, banks: Mapping[str, TrainedBank], experts: int) -> None:
        """Takes its slot: `experts` places of every bank."""
        first = self.slot * experts
        self.cuts = [cut for path, layer in self.layers.items() for cut in cuts(layer, banks[path], first)]
        self.write()

    def write(self) -> None:
        for cut in self.cuts:
            cut.write()

    def block(self, start: int, rows: int, heads: Mapping[str, nn.Module], device: torch.device) -> Block:
        """`rows` samples of this name from row `start` on, and all that they draw: by seed, step and process alone."""
        facts = self.job.seed, self.steps, self.forwards, process_rank()
        seeds = {}
        host = generator_of(torch.device("cpu"), *facts, "seeds")
        for path, layer in self.layers.items():
            drawn = torch.randint(2**63 - 1, (), generator=host)
            if isinstance(layer, RoutedLoRALinear) and layer.dropout:
                seeds[path] = (layer.dropout, drawn)
        head: dict[str, Callable[..., torch.Tensor]] = {path: self.heads.get(path, heads[path]) for path in heads}
        return Block(self.name, start, start + rows * self.job.config.passes, generator_of(device, *facts), head, seeds)

    def experts(self, rows: int, paths: list[str], experts: int) -> torch.Tensor:
        """[paths, 2, passes * rows]: the place in the banks of each row's expert, for each side."""
        config = self.job.config
        host = generator_of(torch.device("cpu"), self.job.seed, self.steps, self.forwards, process_rank(), "experts")
        each = 1 if config.routing == "batch" else rows
        drawn = torch.randint(config.num_experts, (len(self.layers), 2, config.passes, each), generator=host)
        drawn = drawn.expand(-1, -1, -1, rows).flatten(2).clone()
        for side, shared in enumerate(("down", "up")):
            if config.share == shared:
                drawn[:, side] = 0
        found = torch.zeros(len(paths), 2, drawn.shape[2], dtype=torch.int64)
        found[[paths.index(path) for path in self.layers]] = drawn
        return found + self.slot * experts

    def next_rows(self, rows: int, batch_size: int) -> list[int]:
        """The numbers of the rows of this name's next update: an order for each round through them, by its seed."""
        found: list[int] = []
        first, end = self.steps * batch_size, (self.steps + 1) * batch_size
        for turn in range(first // rows, (end - 1) // rows + 1):
            generator = generator_of(torch.device("cpu"), self.job.seed, turn, "order")
            order = torch.randperm(rows, generator=generator).tolist()
            found += order[max(first - turn * rows, 0) : end - turn * rows]
        return found[process_rank() :: processes()]

    def add(self, rows: int, targets: torch.Tensor, sums: torch.Tensor) -> None:
        """After a backward. targets: how many terms the sums have. sums: loss, cross-entropy, consistency."""
        self.rows, self.forwards = self.rows + rows, self.forwards + 1
        self.totals = torch.cat([targets.reshape(1), sums]) + (0 if self.totals is None else self.totals)

    def forget(self) -> None:
        """What was accumulated since the last update is dropped."""
        self.rows, self.forwards, self.totals = 0, 0, None
        for parameter in self.parameters():
            parameter.grad = None

    rows: int
    forwards: int
    totals: torch.Tensor | None

    @torch.no_grad()
    def update(self) -> PackStep:
        """AdamW's step with the mean over the name's own targets; writes the new values into the banks."""
        assert self.totals is not None
        count = self.totals[0].clamp(min=1)
        for cut in self.cuts:
            cut.take_gradient(count)
        for head in self.heads.values():
            for parameter in head.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(count)
        norm = None
        if self.job.max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters(), self.job.max_grad_norm)
        lr: float = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.steps += 1
        self.write()
        loss, cross_entropy, consistency = (self.totals[1:] / count).unbind()
        self.forget()
        return PackStep(loss, cross_entropy, consistency, norm, lr, self.steps)


def _own_head(model: nn.Module, module: nn.Module) -> nn.Module:
    """A copy that can be trained."""
    head = copy.deepcopy(module)
    if any(not p.is_floating_point() for p in head.parameters()):
        raise ValueError(
            f"modules_to_save: got a quantised {type(module).__name__}, expected floating weights, or [] to freeze it"
        )
    return head.requires_grad_(True).train()


@contextlib.contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it other modules stand at these paths of `model`."""
    before = {path: model.get_submodule(path) for path in modules}
    mode = model.training
    for path, module in modules.items():
        replace_module(model, path, module)
    model.train(mode)
    try:
        yield
    finally:
        for path, module in before.items():
            replace_module(model, path, module)
        model.train(mode)


def base_of(layer: nn.Module) -> nn.Module:
    """The layer of the base that an adapted one stands for."""
    return layer.base if isinstance(layer, (AdaptedLayer, RoutedLoRALinear, TrainedBank)) else layer
