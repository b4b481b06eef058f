"""The arguments of the losses' ops, in order: schemas, fakes and backends go by these lists."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch

Backward = TypeVar("Backward", bound=tuple[Any, ...])


class Consistency(NamedTuple):
    """Two passes' logits [..., V] and the rows [...] that count."""

    logits_a: torch.Tensor
    logits_b: torch.Tensor
    mask: torch.Tensor | None
    detach_target: bool
    reduction: str


class ConsistencyBackward(NamedTuple):
    """grad: 0-dim, or one per row for "none"."""

    grad: torch.Tensor
    logits_a: torch.Tensor
    logits_b: torch.Tensor
    mask: torch.Tensor | None
    stats: torch.Tensor
    scale: torch.Tensor
    detach_target: bool


class AdaMix(NamedTuple):
    """Logits [2B, ..., V] of both passes, labels [B, ...]."""

    logits: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None
    num_items: torch.Tensor | None
    weight: float
    ignore_index: int
    label_smoothing: float
    detach_target: bool


class AdaMixBackward(NamedTuple):
    """stats, scales: of the forward."""

    grad: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None
    stats: torch.Tensor
    scales: torch.Tensor
    weight: float
    ignore_index: int
    label_smoothing: float
    detach_target: bool


class Linear(NamedTuple):
    """chunk_rows: row pairs at a time, 0 for the op's own rule."""

    hidden: torch.Tensor
    lm_head_weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    mask: torch.Tensor | None
    num_items: torch.Tensor | None
    weight: float
    ignore_index: int
    label_smoothing: float
    detach_target: bool
    chunk_rows: int
    need_hidden: bool
    need_weight: bool
    need_bias: bool


def split(kind: type[Backward], arguments: tuple[Any, ...]) -> tuple[Backward, Any, Any]:
    """A backward's arguments, and what may stand behind them: where to write, for what incoming gradient (or None)."""
    few = len(kind.__annotations__)
    out, expected = (*arguments[few:], None, None)[:2]
    return kind(*arguments[:few]), out, expected
