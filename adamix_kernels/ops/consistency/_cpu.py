"""The reference in eager mode on a CPU: the loss and its gradient in one visit of every row pair.

The formulas of reference.py in fewer calls, and without a second exp. Coefficients are numbers: reading a value costs
nothing here. Rows are taken in blocks (_blocks.py); no bit depends on them, or on the incoming gradient that was
expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ._blocks import At, rows_by_blocks
from ._rows import divergence, divergence_grad, keep, rows_of, span_of, wide_dtype
from .signatures import AdaMix, AdaMixBackward, Consistency, ConsistencyBackward

MANY, _LOG2_E = 1024, 1 / math.log(2)
_Gradients = tuple[torch.Tensor | None, torch.Tensor | None]


def consistency(a: Consistency, expected: float, to: _Gradients) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, scale); to: where the gradients for an incoming one of `expected` go, None where not wanted."""
    rows, wide = a.logits_a.shape[:-1].numel(), wide_dtype(a.logits_a.dtype)
    if a.mask is not None and a.reduction == "batchmean":
        rows = int(a.mask.sum())
    scale = a.logits_a.new_full((), _over(rows) if a.reduction == "batchmean" else 1.0, dtype=wide)
    factor = scale.item()
    coefficient = as_stored(expected, wide) * factor
    twice = _visit_pair(a.logits_a, a.logits_b, _or_none(a.mask), a.detach_target, coefficient, to)
    return twice.sum().mul_(0.5 * factor), scale


def consistency_again(a: ConsistencyBackward, to: _Gradients) -> None:
    """The gradients for the incoming one."""
    _visit_pair(a.logits_a, a.logits_b, _or_none(a.mask), a.detach_target, a.grad.item() * a.scale.item(), to)


def adamix(
    a: AdaMix, expected: float, d_logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, cross-entropy, consistency, scales [2]); d_logits as `to` above."""
    logits, labels, mask, num_items, weight, ignore_index, smoothing, detach_target = a
    counted, selected = _rows_that_count(labels, mask, ignore_index)
    if num_items is not None:
        numbers = [num_items.item()] * 2
    else:
        numbers = [labels.numel() if rows is None else int(rows.sum()) for rows in (counted, selected)]
    wide = wide_dtype(logits.dtype)
    scales = logits.new_full((2,), _over(numbers[0]), dtype=wide)
    if numbers[1] != numbers[0]:
        scales[1] = _over(numbers[1])
    entropy, pair = scales.tolist()
    grad = as_stored(expected, wide)
    factors = grad * entropy, grad * pair * weight
    log_likelihoods, twice = _visit_doubled(
        logits, labels, counted, selected, smoothing, detach_target, factors, d_logits
    )
    cross_entropy, divergences = log_likelihoods.sum().mul_(-entropy), twice.sum().mul_(0.5 * pair)
    return torch.add(cross_entropy, divergences, alpha=weight), cross_entropy, divergences, scales


def adamix_again(a: AdaMixBackward, to: torch.Tensor) -> None:
    """The gradient for the incoming one."""
    counted, selected = _rows_that_count(a.labels, a.mask, a.ignore_index)
    entropy, pair = a.scales.tolist()
    factors = a.grad.item() * entropy, a.grad.item() * pair * a.weight
    _visit_doubled(a.logits, a.labels, counted, selected, a.label_smoothing, a.detach_target, factors, to)


def linear_chunk(
    logits: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor,
    selected: torch.Tensor,
    label_smoothing: float,
    detach_target: bool,
    factors: torch.Tensor,
    to: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums of the cross-entropy and of J) over row pairs; to: where the gradient goes, maybe the logits, or None."""
    entropy, pair = factors.tolist()
    rows = _or_none(counted), _or_none(selected)
    log_likelihoods, twice = _visit_doubled(
        logits, labels, *rows, label_smoothing, detach_target, (entropy, pair), to
    )  # fmt: skip
    return log_likelihoods.sum().neg_(), twice.sum().mul_(0.5)


def _visit_doubled(
    logits: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor | None,
    selected: torch.Tensor | None,
    label_smoothing: float,
    detach_target: bool,
    factors: tuple[float, float],
    to: torch.Tensor | None,
) -> Sequence[torch.Tensor]:
    """(minus the cross-entropy, 2 J) of each row, 0 where it does not count; None for counted, selected: all count.

    factors: of the cross-entropy and of J in the gradient, which goes to `to`, 0 outside selected; None: nowhere.
    """
    first = logits[: labels.shape[0]]
    into = (None, None) if to is None else to.chunk(2)
    wide = wide_dtype(logits.dtype)

    def read(at: At) -> Sequence[torch.Tensor]:
        if at:
            second = logits[labels.shape[0] :]
            log_p, log_q = torch.log_softmax(first[at], -1, wide), torch.log_softmax(second[at], -1, wide)
            p, q = _exp(log_p), _exp(log_q)
        else:
            log_probs = torch.log_softmax(logits, -1, wide)
            (log_p, log_q), (p, q) = log_probs.chunk(2), _exp(log_probs).chunk(2)
        here = None if counted is None else counted[at]
        target = keep(labels[at] if at else labels, here).long().unsqueeze(-1)
        log_likelihoods = log_p.gather(-1, target).squeeze_(-1)
        if label_smoothing:
            log_likelihoods.mul_(1 - label_smoothing).add_(log_p.mean(-1), alpha=label_smoothing)
        twice, slopes = divergence(log_p, log_q, p, q, not detach_target)
        if to is not None:
            places = _places(into, p.dtype, at)
            ga, gb = divergence_grad(p, q, slopes, factors[1], places)
            _add_entropy_grad(ga, p, target, here, factors[0], label_smoothing)
            _write(into, (ga, gb), selected, at, places)
        return keep(log_likelihoods, here), twice

    log_likelihoods, twice = rows_by_blocks(read, first)
    return log_likelihoods, keep(twice, selected)


def _add_entropy_grad(
    ga: torch.Tensor,
    p: torch.Tensor,
    target: torch.Tensor,
    counted: torch.Tensor | None,
    factor: float,
    smoothing: float,
) -> None:
    """ga += factor * (p - (1 - s) [class is target] - s / V) in the rows that count."""
    if counted is None and not smoothing:
        ga.add_(p, alpha=factor).scatter_(-1, target, -factor, reduce="add")
        return
    share = keep(ga.new_full(target.shape, factor), None if counted is None else counted.unsqueeze(-1))
    ga.addcmul_(p, share)
    if smoothing:
        ga.sub_(share * (smoothing / p.shape[-1]))
    ga.scatter_add_(-1, target, share * (smoothing - 1))


def _visit_pair(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    coefficient: float,
    to: _Gradients,
) -> torch.Tensor:
    """2 J of each row, 0 where it does not count."""
    wide = wide_dtype(logits_a.dtype)

    def read(at: At) -> Sequence[torch.Tensor]:
        a, b = (logits_a[at], logits_b[at]) if at else (logits_a, logits_b)
        log_p, log_q = torch.log_softmax(a, -1, wide), torch.log_softmax(b, -1, wide)
        p, q = _exp(log_p), _exp(log_q)
        twice, slopes = divergence(log_p, log_q, p, q, not detach_target)
        places = _places(to, p.dtype, at)
        _write(to, divergence_grad(p, q, slopes, coefficient, places), mask, at, places)
        return (twice,)

    return keep(rows_by_blocks(read, logits_a)[0], mask)


def _exp(log_probs: torch.Tensor) -> torch.Tensor:
    """exp, for many float32 classes by way of exp2, which PyTorch computes three times as fast on a CPU."""
    if log_probs.dtype == torch.float64 or log_probs.shape[-1] < MANY:
        return log_probs.exp()
    return log_probs.mul(_LOG2_E).exp2_()


def _places(to: Sequence[torch.Tensor | None], dtype: torch.dtype, at: At) -> _Gradients:
    """Of a block, where the gradients go and can be computed, being of their dtype."""
    a, b = (None if one is None or one.dtype != dtype else one[at] if at else one for one in to)
    return a, b


def _write(
    to: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    at: At,
    places: _Gradients,
) -> None:
    """The gradients of a block into their places, where they are not there already; 0 outside the mask."""
    for one, g, place in zip(to, grads, places, strict=True):
        if one is not None:
            if mask is not None:
                g[~mask[at]] = 0
            if place is None:
                (one[at] if at else one).copy_(g)


def _rows_that_count(
    labels: torch.Tensor, mask: torch.Tensor | None, ignore_index: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """rows_of, or two Nones where all count in both losses."""
    if mask is None:
        low, high = span_of(labels)
        if not low <= ignore_index <= high:
            return None, None
    return rows_of(labels, mask, ignore_index)


def _or_none(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None or mask.all() else mask


def _over(number: float) -> float:
    return 1 / number if number > 0 else 0.0


def as_stored(expected: float, dtype: torch.dtype) -> float:
    """As the incoming gradient will hold it."""
    return expected if expected == 1 or dtype == torch.float64 else float(torch.tensor(expected, dtype=dtype))
