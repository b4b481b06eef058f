"""Row-wise pieces: which rows count, softmax statistics, the divergence and its gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all maths and of every loss: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keep(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """values where mask (None: everywhere), else 0; unlike a product it also drops NaN and infinities."""
    return values if mask is None else torch.where(mask, values, 0)


def inverse(count: torch.Tensor) -> torch.Tensor:
    """1 / count, and 0 where count is 0."""
    return torch.where(count > 0, 1 / count, 0)


def rows_of(labels: torch.Tensor, mask: torch.Tensor | None, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of the cross-entropy, rows of the consistency); the first are among the second."""
    labelled = labels != ignore_index
    return (labelled, labelled) if mask is None else (labelled & mask, mask)


def span_of(labels: torch.Tensor) -> tuple[int, int]:
    """The least and the largest label, read on the host; 0 and 0 of none."""
    if labels.numel() == 0:
        return 0, 0
    low, high = labels.aminmax()
    return int(low.item()), int(high.item())


def scales_of(
    counted: torch.Tensor, selected: torch.Tensor, num_items: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """[2]: one over the number of cross-entropy rows and of consistency rows, 0 where there are none."""
    if num_items is not None:
        return inverse(num_items.to(dtype)).expand(2).contiguous()
    return inverse(torch.stack([counted.sum(dtype=dtype), selected.sum(dtype=dtype)]))


def softmax(logits: torch.Tensor, as_restored: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log softmax [..., V], softmax, row maximum [...], log of the row's sum of exp(x - maximum)), wide.

    The two statistics stay apart: their sum would round away the second where logits are large. The log softmax has the
    bits that `restore` gives: what the backward subtracts from its own d must be the mean of the same d, or where
    logits are large a rounding of d is left of the difference. as_restored: so has the softmax, at the price of another
    exp, for the means to hold the rounding of the same p - q.
    """
    wide = logits.to(wide_dtype(logits.dtype))
    maximum = wide.amax(-1)
    log_probs = _minus(wide, maximum, wide is not logits)
    probs = log_probs.exp()
    total = probs.sum(-1)
    logsum = total.log()
    log_probs.sub_(logsum.unsqueeze(-1))
    probs = torch.exp(log_probs, out=probs) if as_restored else probs.div_(total.unsqueeze(-1))
    return log_probs, probs, maximum, logsum


def restore(logits: torch.Tensor, maximum: torch.Tensor, logsum: torch.Tensor) -> torch.Tensor:
    """The log softmax from its saved statistics."""
    wide = logits.to(maximum.dtype)
    return _minus(wide, maximum, wide is not logits).sub_(logsum.unsqueeze(-1))


def _minus(wide: torch.Tensor, maximum: torch.Tensor, own: bool) -> torch.Tensor:
    """wide - maximum of its rows, in wide's memory where that is our own."""
    return wide.sub_(maximum.unsqueeze(-1)) if own else wide - maximum.unsqueeze(-1)


class Slopes(NamedTuple):
    """What the gradient of a divergence takes beside p and q: gap = p - q; without means the targets are constants."""

    gap: torch.Tensor
    d: torch.Tensor | None
    mean_p: torch.Tensor | None
    mean_q: torch.Tensor | None


def divergence(
    log_p: torch.Tensor, log_q: torch.Tensor, p: torch.Tensor, q: torch.Tensor, need_means: bool
) -> tuple[torch.Tensor, Slopes]:
    """2 J = sum (p - q) d per row, and with need_means E_p[d] and E_q[d] among the slopes.

    p - q and d have the same sign in every class, so nothing cancels. The means take the sum of p - q along, which is
    its rounding alone: divergence_grad subtracts it, so that a row's gradient sums to 0 also where p is nearly q.
    """
    d, gap = _difference(log_p, log_q), p - q
    if not need_means:
        return d.mul_(gap).sum(-1), Slopes(gap, None, None, None)
    # Apart from the products: beside a large one the small sum would be rounded away.
    rounding = gap.sum(-1)
    means = (p * d).sum(-1).add_(rounding), (q * d).sum(-1).add_(rounding)
    return (gap * d).sum(-1), Slopes(gap, d, *means)


def restored_slopes(
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    mean_p: torch.Tensor | None,
    mean_q: torch.Tensor | None,
) -> Slopes:
    """Those of `divergence`, from the means it gave."""
    return Slopes(p - q, None if mean_p is None else _difference(log_p, log_q), mean_p, mean_q)


def divergence_grad(
    p: torch.Tensor,
    q: torch.Tensor,
    slopes: Slopes,
    coefficient: torch.Tensor | float,
    to: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """coefficient * dJ/da and dJ/db: [..., V], in `to` where given; coefficient broadcasts to them. Overwrites the
    slopes.

    constant targets: 1/2 (p - q) and its opposite
    otherwise:        1/2 [p (d - E_p d) + p - q] and 1/2 [-q (d - E_q d) - (p - q)]
    """
    gap, d, mean_p, mean_q = slopes
    half = coefficient * 0.5
    if d is None or mean_p is None or mean_q is None:
        ga = torch.mul(gap, half, out=gap if to[0] is None else to[0])
        return ga, torch.neg(ga, out=to[1])
    ga = (d - mean_p.unsqueeze(-1)).mul_(p).add_(gap)
    gb = d.sub_(mean_q.unsqueeze(-1)).mul_(q).add_(gap)
    return torch.mul(ga, half, out=ga if to[0] is None else to[0]), torch.mul(
        gb, -half, out=gb if to[1] is None else to[1]
    )


def cross_entropy_rows(
    log_p: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """-(1 - s) log p[label] - s mean(log p), per row; meaningless where not counted."""
    rows = log_p.gather(-1, torch.where(counted, labels, 0).long().unsqueeze(-1)).squeeze(-1).neg()
    if label_smoothing:
        rows = (1 - label_smoothing) * rows - label_smoothing * log_p.mean(-1)
    return rows


def pair_grad(
    probs: torch.Tensor,
    slopes: Slopes,
    labels: torch.Tensor,
    counted: torch.Tensor,
    entropy_scale: torch.Tensor,
    consistency_scale: torch.Tensor | float,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient on a and on b; scales: a 0-dim tensor, and one or a number. Overwrites the slopes."""
    p, q = probs[0], probs[1]
    ga, gb = divergence_grad(p, q, slopes, consistency_scale)
    share = torch.where(counted, entropy_scale, 0).unsqueeze(-1)
    ga.addcmul_(p, share)
    if label_smoothing:
        ga.sub_(share * (label_smoothing / p.shape[-1]))
    target = torch.where(counted, labels, 0).long().unsqueeze(-1)
    return ga.scatter_add_(-1, target, share * (label_smoothing - 1)), gb


def _difference(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """d = log p - log q, with 0 where both are -inf (a class that neither pass can choose)."""
    d = log_p - log_q
    # On a CPU a look whether there is such a class takes a tenth of the time of filling them.
    if d.device.type == "cpu" and math.isfinite(d.sum()):
        return d
    return d.masked_fill_(log_p == log_q, 0)
