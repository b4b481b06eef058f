"""One visit of every row pair: row losses, row statistics and, where they are wanted, the gradients of both logits.

Rows are taken in blocks (_blocks.py). A gradient may take the place of the logits that it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._blocks import At, rows_by_blocks
from ._rows import Slopes, divergence, divergence_grad, keep, softmax

_Pair = tuple[torch.Tensor, torch.Tensor]
# Before a block's slices: both passes.
BOTH: At = (slice(None),)


def visit_consistency(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    coefficient: torch.Tensor | None = None,
    to: Sequence[torch.Tensor | None] = (None, None),
) -> Sequence[torch.Tensor]:
    """[J of each row, maxima and log sums of a and b, then E_p d and E_q d unless detached].

    to: where coefficient * dJ/da and dJ/db go, 0 outside the mask; nowhere without a coefficient.
    """

    def read(at: At) -> Sequence[torch.Tensor]:
        restored = not detach_target and coefficient is None
        log_p, p, *stats_a = softmax(logits_a[at], restored)
        log_q, q, *stats_b = softmax(logits_b[at], restored)
        rows, slopes = divergence(log_p, log_q, p, q, not detach_target)
        if coefficient is not None:
            write(to, divergence_grad(p, q, slopes, coefficient), mask, at)
        pairs = zip([*stats_a, slopes.mean_p], [*stats_b, slopes.mean_q], strict=True)
        return [rows, *(t for pair in pairs for t in pair if t is not None)]

    return rows_by_blocks(read, logits_a)


def visit_adamix(
    logits: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor | None,
    selected: torch.Tensor | None,
    label_smoothing: float,
    detach_target: bool,
    factors: _Pair | None = None,
    to: torch.Tensor | None = None,
) -> Sequence[torch.Tensor]:
    """[cross-entropy of each row, J, maxima [2, ..], log sums [2, ..], then E_p d and E_q d [2, ..] unless detached].

    counted, selected: rows of either loss, None for all. factors: of both losses in the gradient of the logits, which
    goes to `to`, 0 outside `selected`; without them nothing is written.
    """
    both = passes(logits)

    def read(at: At) -> Sequence[torch.Tensor]:
        log_probs, probs, *stats = softmax(both[BOTH + at], not detach_target and factors is None)
        here = None if counted is None else counted[at]
        target = (labels[at] if here is None else torch.where(here, labels[at], 0)).long().unsqueeze(-1)
        entropy_rows = _cross_entropy(log_probs[0], target, label_smoothing)
        rows, slopes = divergence(log_probs[0], log_probs[1], probs[0], probs[1], not detach_target)
        if factors is not None and to is not None:
            grads = pair_grad(probs, slopes, target, here, factors, label_smoothing)
            write(passes(to), grads, selected, at)
        means = [] if slopes.mean_p is None or slopes.mean_q is None else [torch.stack([slopes.mean_p, slopes.mean_q])]
        return [entropy_rows, rows, *stats, *means]

    return rows_by_blocks(read, both[0])


def pair_grad(
    probs: torch.Tensor,
    slopes: Slopes,
    target: torch.Tensor,
    counted: torch.Tensor | None,
    factors: _Pair,
    label_smoothing: float,
) -> _Pair:
    """Gradients of both logits, from both softmaxes [2, ..., V]; target [..., 1]. Overwrites the slopes."""
    p, q = probs[0], probs[1]
    ga, gb = divergence_grad(p, q, slopes, factors[1])
    share = factors[0] if counted is None else torch.where(counted, factors[0], 0).unsqueeze(-1)
    ga.addcmul_(p, share)
    if label_smoothing:
        ga.sub_(share * (label_smoothing / p.shape[-1]))
    return ga.scatter_add_(-1, target, (share * (label_smoothing - 1)).expand(target.shape)), gb


def _cross_entropy(log_p: torch.Tensor, target: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-(1 - s) log p[label] - s mean(log p), per row; meaningless where not counted. target [..., 1]."""
    rows = log_p.gather(-1, target).squeeze(-1).neg()
    if label_smoothing:
        rows = (1 - label_smoothing) * rows - label_smoothing * log_p.mean(-1)
    return rows


def write(
    to: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor], mask: torch.Tensor | None, at: At
) -> None:
    """The gradients of a block into their places, 0 outside the mask; None: not wanted."""
    for one, g in zip(to, grads, strict=True):
        if one is not None:
            one[at].copy_(keep(g, None if mask is None else mask[at].unsqueeze(-1)))


def passes(logits: torch.Tensor) -> torch.Tensor:
    """[2B, ..., V] -> [2, B, ..., V]."""
    return logits.unflatten(0, (2, logits.shape[0] // 2))
