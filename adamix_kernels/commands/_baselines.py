"""What a trained run is set beside: the majority class or the mean, and the frozen encoder with a trained head."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..tasks.frozen import HEAD_LEARNING_RATE, length_batches, mean_features, train_linear
from ..tasks.generation import token_loss
from ._kinds import FALLING, PLAIN, Kind, LabelKind

MAJORITY, MEAN = "majority class", "mean of the training labels"
FROZEN, UNADAPTED = "frozen encoder with a trained head", "the model before training"


@dataclass(frozen=True)
class Work:
    """The training that the baselines repeat: encoded rows, batch size, optimizer steps, seed."""

    train: Sequence[dict[str, Any]]
    dev: Sequence[dict[str, Any]]
    batch_size: int
    steps: int
    seed: int


@dataclass
class Baselines:
    """values: by name, then by metric, in the units of Kind.scores. absent: why one is not there."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def measure(model: nn.Module, kind: Kind, work: Work, progress: bool) -> Baselines:
    """Of a model that is not adapted yet; its head's weights and the global generators are left alone.

    The head is one linear layer on the mean of the last hidden states: the same rows, batch size and number of steps
    as the run, at a learning rate of its own (tasks.frozen.HEAD_LEARNING_RATE).
    """
    training = model.training
    try:
        if isinstance(kind, LabelKind):
            return _of_labels(model, kind, work, progress)
        return Baselines({UNADAPTED: {"loss": token_loss(model, work.dev, kind.collate, kind.batch_size)}})
    finally:
        model.train(training)


def not_above(scores: dict[str, float], baselines: Baselines) -> list[str]:
    """Names of the baselines that `scores` are not better than, by the first metric that both have.

    A perfect score is not worse than another one.
    """
    found = []
    for name, values in baselines.values.items():
        metric = next((m for m in scores if m in values), None)
        if metric is None:
            continue
        better = scores[metric] < values[metric] if metric in FALLING else scores[metric] > values[metric]
        perfect = scores[metric] <= 0 if metric in FALLING else metric not in PLAIN and scores[metric] >= 100
        if not better and not perfect:
            found.append(name)
    return found


def _of_labels(model: nn.Module, kind: LabelKind, work: Work, progress: bool) -> Baselines:
    baselines = Baselines()
    labels, wanted = [row["labels"] for row in work.train], [row["labels"] for row in work.dev]
    if kind.kind == "classification":
        simple, value = MAJORITY, Counter(sorted(labels)).most_common(1)[0][0]
    else:
        simple, value = MEAN, sum(labels) / len(labels)
    baselines.values[simple] = kind.scores([value] * len(wanted), wanted).values
    try:
        features = _features(model, kind, work, progress)
    except (ValueError, TypeError, RuntimeError) as error:  # a model that wants more than text
        baselines.absent[FROZEN] = str(error).splitlines()[0]
        return baselines
    logits = _trained_head(features, labels, kind, work)
    baselines.values[FROZEN] = kind.scores(kind.chosen(logits), wanted).values
    return baselines


def _features(model: nn.Module, kind: LabelKind, work: Work, progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from tqdm.auto import tqdm

    total = len(work.train) + len(work.dev)
    with tqdm(total=total, unit="text", desc="frozen encoder", disable=not progress) as bar:
        train, dev = (mean_features(model, rows, kind.collate, bar.update) for rows in (work.train, work.dev))
    return train, dev


def _trained_head(
    features: tuple[torch.Tensor, torch.Tensor], labels: list[Any], kind: LabelKind, work: Work
) -> torch.Tensor:
    """Logits of the dev rows."""
    train, dev = features
    lengths = [len(row["input_ids"]) for row in work.train]
    epochs = math.ceil(work.steps / math.ceil(len(lengths) / work.batch_size))
    batches = itertools.islice(length_batches(lengths, work.batch_size, epochs, work.seed), work.steps)
    target = torch.tensor(labels)
    shift, scale = 0.0, 1.0
    if kind.kind == "regression":  # the head starts at 0, whatever the labels' unit
        target = target.float()
        shift, scale = target.mean().item(), max(target.std().item(), 1e-6) if len(target) > 1 else 1.0
        target = (target - shift) / scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.seed)
        head = nn.Linear(train.shape[1], len(kind.names) if kind.kind == "classification" else 1)
        train_linear(head, train, target, kind.loss, batches, work.steps, HEAD_LEARNING_RATE)
    with torch.no_grad():
        logits: torch.Tensor = head.eval()(dev)
        return logits * scale + shift if kind.kind == "regression" else logits
