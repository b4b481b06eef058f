"""One (micro-)batch of several names: forward, a loss a name, backward; and the sum over processes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..models.doubling import find_batch_size, take_rows
from ..models.guards import is_reentrant
from ..models.objectives import CAUSAL, IGNORED, Objective
from .banks import TrainedBank
from .mix import Block, Mix, OwnDropout
from .own import Own, processes


@dataclass(frozen=True)
class StepOptions:
    """mix: what the banks look at. experts: places that each name has in a bank. autocast: of the forward, or None."""

    mix: Mix
    experts: int
    autocast: torch.dtype | None


def accumulate(
    model: nn.Module,
    owns: Mapping[str, Own],
    banks: Mapping[str, TrainedBank],
    heads: Mapping[str, nn.Module],
    options: StepOptions,
    inputs: dict[str, Any],
    names: Sequence[str],
) -> None:
    """PackTrainer.accumulate. owns: of all names that are trained. heads: the model's own, by path."""
    labels = inputs.pop("labels", None)
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"batch: got {sorted(inputs)}, expected a tensor of labels among them")
    size = find_batch_size(inputs)
    if isinstance(names, str) or len(names) != size or labels.shape[0] != size:
        raise ValueError(f"names: got {len(names)} for {size} rows and {labels.shape[0]} labels, expected as many")
    for name in dict.fromkeys(names):
        if name not in owns:
            raise ValueError(f"names: got {name!r}, expected one of {', '.join(owns) or 'none: nothing is trained'}")
        if owns[name].paused:
            raise ValueError(f"names: got {name!r}, which is paused, expected resume() first, or other rows")
    parts = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
    if any(is_reentrant(part) for part in parts):
        raise ValueError("model: got reentrant activation checkpointing, expected use_reentrant=False")
    device = labels.device
    whose = {name: [n for n, mine in enumerate(names) if mine == name] for name in owns}
    whose = {name: rows for name, rows in whose.items() if rows}  # in the order of owns
    order: list[int] = []
    blocks, index = [], []
    for name, mine in whose.items():
        own = owns[name]
        blocks.append(own.block(len(order), len(mine), heads, device))
        index.append(own.experts(len(mine), list(banks), options.experts))
        order += mine * own.job.config.passes
    table = torch.cat(index, 2).to(device)
    inputs = Objective(model).prepare(inputs, labels)
    picked = take_rows(inputs, torch.tensor(order, device=device), size)
    given = {name: labels[rows] for name, rows in whose.items()}
    model.train()
    with options.mix.running(blocks, dict(zip(banks, table.unbind(), strict=True))):
        losses = _losses(model, owns, options, blocks, picked, given, bool(parts))
        torch.autograd.backward([loss[0] for loss, _ in losses.values()])
    for name, (sums, targets) in losses.items():
        owns[name].add(len(whose[name]), targets, sums.detach())


def _losses(
    model: nn.Module,
    owns: Mapping[str, Own],
    options: StepOptions,
    blocks: list[Block],
    inputs: dict[str, Any],
    labels: Mapping[str, torch.Tensor],
    recomputes: bool,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """name -> (sums of loss, cross-entropy and consistency, number of targets)."""
    plain = Objective(model)
    twice = {block.name: owns[block.name].job.config.passes == 2 for block in blocks}
    fused = plain.task == CAUSAL and plain.plain_head() is not None
    extra: dict[str, Any] = {"output_hidden_states": True} if fused and any(twice.values()) else {}
    if extra and all(twice.values()):
        extra["logits_to_keep"] = 1  # nobody needs them
    where = next(iter(labels.values())).device.type

    def autocast() -> contextlib.AbstractContextManager[Any]:
        dtype = options.autocast
        return contextlib.nullcontext() if dtype is None else torch.autocast(where, dtype=dtype)

    with autocast(), OwnDropout(options.mix, recomputes):
        outputs = model(**inputs, **extra)
    found = {}
    for block in blocks:
        own, rows = owns[block.name], slice(block.start, block.stop)
        mine: dict[str, Any] = {"logits": outputs["logits"][rows][..., : block.columns]}
        if extra:
            mine["hidden_states"] = (outputs["hidden_states"][-1][rows],)
        objective, given = Objective(model, own.labels), labels[block.name]
        if given.is_floating_point() and own.labels.problem_type == "single_label_classification":
            given = given.long()
        result, _ = objective.loss(
            _Given(mine),
            {},
            given,
            doubled=twice[block.name],
            weight=own.job.config.consistency_weight,
            label_smoothing=own.job.label_smoothing,
            num_items=1,
            autocast=autocast,
        )
        targets = (objective.targets(given) != IGNORED).sum()
        found[block.name] = torch.stack([result.loss, result.cross_entropy, result.consistency]), targets
    return found


@torch.no_grad()
def sum_over_processes(names: Mapping[str, Own], banks: Mapping[str, TrainedBank]) -> None:
    """Gradients, sums and counts of all processes, added in one call."""
    if processes() == 1:
        return
    owns = list(names.values())
    parameters = [p for bank in banks.values() for p in bank.parameters(recurse=False)]
    parameters += [p for own in owns for head in own.heads.values() for p in head.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    device = parameters[0].device
    totals = [torch.zeros(4, device=device) if own.totals is None else own.totals for own in owns]
    rows = torch.tensor([own.rows for own in owns], device=device, dtype=torch.float32)
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([t.reshape(-1) for t in (*grads, *totals, rows)])
    dist.all_reduce(flat)
    pieces = flat.split([t.numel() for t in (*grads, *totals, rows)])
    for grad, piece in zip(grads, pieces, strict=False):
        grad.copy_(piece.view_as(grad))
    for own, piece, count in zip(owns, pieces[len(grads) : -1], pieces[-1].tolist(), strict=True):
        own.totals, own.rows = piece.clone(), int(count)


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


class _Given(nn.Module):
    """Stands for the model where its outputs are at hand."""

    def __init__(self, outputs: dict[str, Any]):
        super().__init__()
        self.outputs = _Outputs(outputs)

    def forward(self, **_inputs: Any) -> dict[str, Any]:
        return self.outputs


class _Outputs(dict[str, Any]):
    """A model's outputs by name or by attribute."""

    __getattr__ = dict.__getitem__
