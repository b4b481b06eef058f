"""The demo's training loops, written out in plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..functional import adamix_loss
from ..models.doubling import double_batch
from ..models.state import adamix_state
from ..models.targets import saved_modules
from ..tasks import TextTask, collator, tokenize
from ..tasks.frozen import length_batches, mean_features, train_linear, warmed_up


@dataclass(frozen=True)
class Settings:
    """lr: of the plain adapter. adamix_lr: of the experts. head_lr: of the head. consistency: weight of the KL term."""

    epochs: int
    batch_size: int
    lr: float
    adamix_lr: float
    head_lr: float
    consistency: float

    def steps(self, rows: int) -> int:
        return self.epochs * -(-rows // self.batch_size)


@dataclass(frozen=True)
class Data:
    """Tokenized rows, and what makes a padded batch of some."""

    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    collate: Callable[..., Any]


@dataclass
class Curve:
    """One value a step; consistency stays empty with one pass."""

    cross_entropy: list[float] = field(default_factory=list)
    consistency: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def prepare(
    task: TextTask, tokenizer: Any, max_tokens: int, shots: int | None, max_dev: int | None, seeds: int
) -> list[Data]:
    """For each seed its own draw of `shots` training rows, classes in proportion (None: all), and the same dev rows."""
    dev = tokenize(task.dev.sample(max_dev), tokenizer, max_tokens)
    drawn = [task.train.sample(shots, seed) for seed in range(seeds)]
    return [Data(tokenize(split, tokenizer, max_tokens), dev, collator(tokenizer)) for split in drawn]


def batches(rows: list[dict[str, Any]], settings: Settings, seed: int) -> Iterator[list[int]]:
    """Row numbers of every training batch, of like lengths: the same for every method with the same seed."""
    return length_batches([len(row["input_ids"]) for row in rows], settings.batch_size, settings.epochs, seed)


def train(model: nn.Module, data: Data, settings: Settings, seed: int, bar: Any) -> Curve:
    """Trains what requires grad in an adapted model: one pass, or both AdaMix passes in one doubled batch."""
    weight = adamix_state(model).config.consistency_weight
    heads = [p for _, head in saved_modules(model, None) for p in head.parameters()]
    adapters = [p for p in model.parameters() if p.requires_grad and not any(p is h for h in heads)]
    lr = settings.adamix_lr if weight > 0 else settings.lr
    groups = [(lr, adapters), (settings.head_lr, heads)]
    optimizer, schedule = warmed_up(groups, settings.steps(len(data.train)))
    torch.manual_seed(seed)
    model.train()
    curve = Curve()
    for rows in batches(data.train, settings, seed):
        start = time.perf_counter()
        inputs = dict(data.collate([data.train[i] for i in rows]))
        labels = inputs.pop("labels")
        if weight > 0:
            logits = model(**double_batch(inputs, len(rows))).logits
            loss, cross_entropy, consistency = adamix_loss(logits, labels, weight=weight)
            curve.consistency.append(consistency.item())
        else:
            loss = cross_entropy = F.cross_entropy(model(**inputs).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.cross_entropy.append(cross_entropy.item())
        curve.seconds.append(time.perf_counter() - start)
        bar.update()
    return curve


def frozen_features(model: nn.Module, data: Data) -> dict[str, torch.Tensor]:
    """Mean-pooled last hidden states [rows, H] of both splits, without dropout.

    They are what the head reads in the adapted rows too (see load_classifier).
    """
    return {name: mean_features(model, getattr(data, name), data.collate) for name in ("train", "dev")}


def train_head(
    model: nn.Module, features: dict[str, torch.Tensor], data: Data, settings: Settings, seed: int, bar: Any
) -> tuple[nn.Linear, Curve]:
    """Trains a linear head on frozen features, from the initial head of `model` where that is one linear layer."""
    hidden = features["train"].shape[1]
    config: Any = model.config
    head = nn.Linear(hidden, config.num_labels)
    heads = [m for _, m in saved_modules(model, None) if isinstance(m, nn.Linear) and m.in_features == hidden]
    if heads:
        head.load_state_dict({**head.state_dict(), **heads[0].state_dict()})
    labels = torch.tensor([row["labels"] for row in data.train])
    curve = Curve()

    def on_step(loss: float, seconds: float) -> None:
        curve.cross_entropy.append(loss)
        curve.seconds.append(seconds)
        bar.update()

    steps = settings.steps(len(data.train))
    made = batches(data.train, settings, seed)
    train_linear(head, features["train"], labels, F.cross_entropy, made, steps, settings.head_lr, on_step)
    return head, curve
