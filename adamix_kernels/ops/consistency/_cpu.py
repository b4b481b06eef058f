"""The reference in eager mode on a CPU: the loss and its gradient in one visit of every row pair.

The formulas of reference.py in fewer calls, and without a second exp. Coefficients are numbers: reading a value costs
nothing here. Rows are taken in blocks (_blocks.py); no bit depends on them, or on the incoming gradient that was
expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._blocks import At, rows_by_blocks
from ._rows import divergence, divergence_grad, keep, rows_of, wide_dtype

# Before a block's slices: both passes.
_BOTH: At = (slice(None),)
_Gradients = tuple[torch.Tensor | None, torch.Tensor | None]


def consistency(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    reduction: str,
    expected: float,
    to: _Gradients,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, scale); to: where the gradients for an incoming one of `expected` go, None where not wanted."""
    rows, wide = logits_a.shape[:-1].numel(), wide_dtype(logits_a.dtype)
    if mask is not None and reduction == "batchmean":
        rows = int(mask.sum())
    scale = logits_a.new_full((), _over(rows) if reduction == "batchmean" else 1.0, dtype=wide)
    coefficient = _as_stored(expected, wide) * scale.item()
    each = _visit_pair(logits_a, logits_b, _or_none(mask), detach_target, coefficient, to)
    return each.sum().mul_(scale), scale


def consistency_again(
    grad: torch.Tensor,
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    scale: torch.Tensor,
    detach_target: bool,
    to: _Gradients,
) -> None:
    """The gradients for the incoming one."""
    _visit_pair(logits_a, logits_b, _or_none(mask), detach_target, grad.item() * scale.item(), to)


def adamix(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    expected: float,
    d_logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, cross-entropy, consistency, scales [2]); d_logits as `to` above."""
    counted, selected = _rows_that_count(labels, mask, ignore_index)
    if num_items is not None:
        numbers = [num_items.item()] * 2
    else:
        numbers = [labels.numel() if rows is None else int(rows.sum()) for rows in (counted, selected)]
    wide = wide_dtype(logits.dtype)
    scales = torch.tensor([_over(n) for n in numbers], dtype=wide)
    factors = _factors(_as_stored(expected, wide), scales, weight)
    sums = visit_doubled(logits, labels, counted, selected, label_smoothing, detach_target, factors, d_logits)
    cross_entropy, divergences = (each.sum().mul_(scale) for each, scale in zip(sums, scales.unbind(), strict=True))
    return torch.add(cross_entropy, divergences, alpha=weight), cross_entropy, divergences, scales


def adamix_again(
    grad: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    scales: torch.Tensor,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    to: torch.Tensor,
) -> None:
    """The gradient for the incoming one."""
    counted, selected = _rows_that_count(labels, mask, ignore_index)
    factors = _factors(grad.item(), scales, weight)
    visit_doubled(logits, labels, counted, selected, label_smoothing, detach_target, factors, to)


def visit_doubled(
    logits: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor | None,
    selected: torch.Tensor | None,
    label_smoothing: float,
    detach_target: bool,
    factors: tuple[float, float] | None,
    to: torch.Tensor | None,
) -> Sequence[torch.Tensor]:
    """(cross-entropy, J) of each row, 0 where it does not count; None for counted, selected: all rows count.

    factors: of both in the gradient, which goes to `to`, 0 outside selected; nowhere without.
    """
    both = torch.unflatten(logits, 0, (2, labels.shape[0]))
    into = None if to is None else torch.unflatten(to, 0, (2, labels.shape[0])).unbind()
    wide = wide_dtype(logits.dtype)

    def read(at: At) -> Sequence[torch.Tensor]:
        log_probs = torch.log_softmax(both[_BOTH + at] if at else both, -1, wide)
        (log_p, log_q), (p, q) = log_probs.unbind(), log_probs.exp().unbind()
        here = None if counted is None else counted[at]
        target = keep(labels[at] if at else labels, here).long().unsqueeze(-1)
        entropies = log_p.gather(-1, target).squeeze(-1).neg_()
        if label_smoothing:
            entropies.mul_(1 - label_smoothing).sub_(log_p.mean(-1), alpha=label_smoothing)
        each, slopes = divergence(log_p, log_q, p, q, not detach_target)
        if factors is not None and into is not None:
            ga, gb = divergence_grad(p, q, slopes, factors[1])
            share = ga.new_full(target.shape, factors[0])
            share = share if here is None else keep(share, here.unsqueeze(-1))
            ga.addcmul_(p, share)
            if label_smoothing:
                ga.sub_(share * (label_smoothing / p.shape[-1]))
            ga.scatter_add_(-1, target, share.mul_(label_smoothing - 1))
            _write(into, (ga, gb), selected, at)
        return keep(entropies, here), each

    entropies, each = rows_by_blocks(read, both[0])
    return entropies, keep(each, selected)


def _visit_pair(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    coefficient: float,
    to: _Gradients,
) -> torch.Tensor:
    """J of each row, 0 where it does not count."""
    wide = wide_dtype(logits_a.dtype)

    def read(at: At) -> Sequence[torch.Tensor]:
        log_p, log_q = (torch.log_softmax(x[at] if at else x, -1, wide) for x in (logits_a, logits_b))
        p, q = log_p.exp(), log_q.exp()
        each, slopes = divergence(log_p, log_q, p, q, not detach_target)
        _write(to, divergence_grad(p, q, slopes, coefficient), mask, at)
        return (each,)

    return keep(rows_by_blocks(read, logits_a)[0], mask)


def _write(
    to: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor], mask: torch.Tensor | None, at: At
) -> None:
    """The gradients of a block into their places, 0 outside the mask."""
    for one, g in zip(to, grads, strict=True):
        if one is not None:
            (one[at] if at else one).copy_(g if mask is None else keep(g, mask[at].unsqueeze(-1)))


def _rows_that_count(
    labels: torch.Tensor, mask: torch.Tensor | None, ignore_index: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """rows_of, or two Nones where all count in both losses."""
    if mask is None and not (labels == ignore_index).any():
        return None, None
    return rows_of(labels, mask, ignore_index)


def _or_none(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None or mask.all() else mask


def _over(number: float) -> float:
    return 1 / number if number > 0 else 0.0


def _as_stored(expected: float, dtype: torch.dtype) -> float:
    """As the incoming gradient will hold it."""
    return expected if expected == 1 or dtype == torch.float64 else float(torch.tensor(expected, dtype=dtype))


def _factors(grad: float, scales: torch.Tensor, weight: float) -> tuple[float, float]:
    entropy, pair = scales.tolist()
    return grad * entropy, grad * pair * weight
