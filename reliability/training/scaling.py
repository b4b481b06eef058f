"""float16 under torch.amp.GradScaler: a step whose gradients overflow is skipped, and leaves no trace."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from adamix_kernels import adamix_loss, double_batch
from adamix_kernels.routing import Router

from ..record import Figure
from ..small_models import KINDS, adapted, batch, trained

_STEPS, _OVERFLOWS = 8, (2, 5)
_HUGE, _USUAL = 2.0**100, 2.0**10


@dataclass
class Course:
    """What happened: steps skipped, those whose skip left a trace, final weights and the experts drawn."""

    skipped: list[int] = field(default_factory=list)
    traces: list[int] = field(default_factory=list)
    unused_not_zero: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    drawn: list[list[int]] = field(default_factory=list)


def figures() -> Iterator[Figure]:
    for kind in KINDS:
        start = time.perf_counter()
        scaled, by_hand = train(kind, overflow=True), train(kind, overflow=False)
        same = all(torch.equal(scaled.weights[name], value) for name, value in by_hand.weights.items())
        finite = all(value.isfinite().all() for value in scaled.weights.values())
        yield Figure(
            f"{kind}: {_STEPS} float16 steps, a scale of 2^100 at steps {' and '.join(map(str, _OVERFLOWS))}",
            f"skipped {scaled.skipped}, of these with weights or optimizer changed {scaled.traces}; final bits of the "
            f"run that leaves these updates out: {'yes' if same else 'no'}; same experts drawn: "
            f"{'yes' if scaled.drawn == by_hand.drawn else 'no'}; unused experts with a gradient: "
            f"{scaled.unused_not_zero}",
            f"skipped {list(_OVERFLOWS)}, [], yes, yes, 0",
            scaled.skipped == list(_OVERFLOWS)
            and not scaled.traces
            and same
            and finite
            and scaled.drawn == by_hand.drawn
            and scaled.unused_not_zero == 0,
            time.perf_counter() - start,
        )


def train(kind: str, overflow: bool) -> Course:
    """overflow: the scale is huge at some steps; otherwise these steps' updates are left out by hand."""
    model = adapted(kind, dropout=0.1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=_USUAL, growth_interval=10_000)
    scaler.scale(torch.zeros(()))  # makes it know its scale, which update() may then replace
    course = Course()
    torch.manual_seed(7)
    for step in range(_STEPS):
        hit = step in _OVERFLOWS
        scaler.update(_HUGE if hit and overflow else _USUAL)
        optimizer.zero_grad()
        with _drawing(course):
            loss = _loss(kind, model, step)
        scaler.scale(loss).backward()
        before = trained(model), copy.deepcopy(optimizer.state_dict())
        if hit and not overflow:
            continue
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < (_HUGE if hit else _USUAL):
            course.skipped.append(step)
            if not _same(before, (trained(model), optimizer.state_dict())):
                course.traces.append(step)
        course.unused_not_zero += _unused_not_zero(model, course.drawn[-1])
    course.weights = trained(model)
    return course


def _loss(kind: str, model: nn.Module, step: int) -> torch.Tensor:
    rows = batch(kind, seed=step)
    labels = rows.pop("labels")
    with torch.autocast("cpu", torch.float16):
        logits = model(**double_batch(rows)).logits
    if kind.startswith("GPT-2"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return adamix_loss(logits, labels).loss


class _drawing:
    """Notes the experts that one forward draws."""

    def __init__(self, course: Course):
        self.course = course

    def __enter__(self) -> None:
        self.draw, seen = Router.draw, []
        self.course.drawn.append(seen)

        def draw(router, *args):
            index = self.draw(router, *args)
            seen.append([] if index is None else index.tolist())
            return index

        Router.draw = draw

    def __exit__(self, *_error) -> None:
        Router.draw = self.draw


def _unused_not_zero(model: nn.Module, drawn: list[list[int]]) -> int:
    """Experts that nobody drew and whose gradient is not exactly zero, an overflow's included."""
    found, draws = 0, iter(drawn)
    for path in model.adamix.paths:
        banks = {}
        for name, bank in model.get_submodule(path).named_parameters():
            if bank.requires_grad:
                banks.setdefault(_side(name), []).append(bank)
        for side in sorted(banks):  # "a" before "b", "down" before "up": the order of the draws
            used = set(next(draws))
            for bank in banks[side]:
                unused = [e for e in range(bank.shape[0]) if e not in used and bank.shape[0] > 1]
                found += sum(int(bank.grad[e].count_nonzero() > 0) for e in unused)
    return found


def _side(name: str) -> str:
    last = name.rpartition(".")[2]
    return last.removeprefix("lora_") if last.startswith("lora_") else last.partition("_")[0]


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b
