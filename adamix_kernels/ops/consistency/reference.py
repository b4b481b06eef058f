"""Reference backend of the consistency losses: explicit forward and backward in plain PyTorch.

a and b are the two passes' logits, p and q their softmaxes, d = log p - log q. Leading dimensions are
rows and are never flattened or compacted, so sliced logits cost no copy.

What a backend module holds; arguments are checked and on one device, logits have any strides:
    unsupported(device_type, dtype) -> why it cannot serve them, or None (not here: the reference serves all).
    writes_gradient(device_type, dtype, expected) -> whether the two functions _grad may be asked, in eager mode, where
        the caller expects that incoming gradient (None: did not say). False: two steps, forward and backward.
    forward(logits_a, logits_b, mask, detach_target, reduction) -> (loss, stats, scale)
    forward_grad(.., reduction, expected, da, db) -> (loss, stats, scale); the reduction is no "none"
    backward(grad, logits_a, logits_b, mask, stats, scale, detach_target, out=None, expected=None) -> (da, db)
    adamix_forward(logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target)
        -> (loss, cross-entropy, consistency, stats, scales)
    adamix_forward_grad(.., detach_target, expected, d_logits) -> the same
    adamix_backward(grad, logits, labels, mask, stats, scales, weight, ignore_index, label_smoothing,
        detach_target, out=None, expected=None) -> d_logits
    rescale(gradient, factor): gradient *= factor, in place; no write where the factor is exactly 1.
    linear_forward(..): `_chunks.linear_loss` around the module's own loss of one chunk.
stats: [4 or 6, ...] or [2 or 3, 2B, ...]: row maxima, logs of sums of exp(x - maximum), E_p d and E_q d unless
detached. scale(s): one over the rows of each part, 1 for "sum" and "none".
da, db (None: not wanted), d_logits: written with the gradient for an incoming one of `expected`, by the products
that backward takes with grad in its place. They are contiguous, or the logits themselves.
out: None for new tensors; else where gradients are written, maybe the logits themselves. With `expected` they hold
those for that incoming one, and stay as they are where the device scalar grad equals it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._blocks import At, by_blocks
from ._chunks import Chunk, linear_loss
from ._rows import (
    all_count,
    divergence_grad,
    inverse,
    keep,
    restore,
    restored_slopes,
    rows_of,
    scales_of,
    wide_dtype,
)
from ._visits import BOTH, pair_grad, passes, visit_adamix, visit_consistency, write

_DENSE = torch.contiguous_format
# Before a block's slices: all statistics of both passes.
_ALL: At = (slice(None), *BOTH)


def writes_gradient(device_type: str, dtype: torch.dtype, expected: float | None) -> bool:
    return device_type == "cpu" and (dtype != torch.float16 or expected is not None)


def forward(
    logits_a: torch.Tensor, logits_b: torch.Tensor, mask: torch.Tensor | None, detach_target: bool, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = _scale(logits_a, mask, reduction)
    rows, *stats = visit_consistency(logits_a, logits_b, mask, detach_target)
    rows = keep(rows, mask)
    loss = rows if reduction == "none" else rows.sum() * scale
    return loss.contiguous(), torch.stack(stats), scale


def forward_grad(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    reduction: str,
    expected: float,
    da: torch.Tensor | None,
    db: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = _scale(logits_a, mask, reduction)
    mask = None if all_count(mask) else mask
    rows, *stats = visit_consistency(logits_a, logits_b, mask, detach_target, expected * scale, (da, db))
    return keep(rows, mask).sum() * scale, torch.stack(stats), scale


def backward(
    grad: torch.Tensor,
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    stats: torch.Tensor,
    scale: torch.Tensor,
    detach_target: bool,
    out: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
    expected: float | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if out is not None and logits_a.device.type == "cpu":
        # The bits of forward_grad, whatever was expected there.
        if expected is None or grad != expected:
            visit_consistency(logits_a, logits_b, mask, detach_target, grad * scale, out)
        return out
    da, db = (torch.empty_like(t, memory_format=_DENSE) for t in (logits_a, logits_b)) if out is None else out
    stats, coefficient = stats.unflatten(0, (-1, 2)), (grad * scale).unsqueeze(-1)
    each_row = coefficient.dim() > 1

    def rewrite(at: At) -> None:
        maximum, logsum, *means = stats[_ALL + at]
        log_p, log_q = restore(logits_a[at], maximum[0], logsum[0]), restore(logits_b[at], maximum[1], logsum[1])
        p, q = log_p.exp(), log_q.exp()
        slopes = restored_slopes(log_p, log_q, p, q, *_each(means))
        write((da, db), divergence_grad(p, q, slopes, coefficient[at] if each_row else coefficient), mask, at)

    by_blocks(rewrite, logits_a)
    return da, db


def adamix_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = weight, ignore_index, label_smoothing, detach_target
    return _adamix(logits, labels, mask, num_items, *options, None, None)


def adamix_forward_grad(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = weight, ignore_index, label_smoothing, detach_target
    return _adamix(logits, labels, mask, num_items, *options, expected, d_logits)


def adamix_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    stats: torch.Tensor,
    scales: torch.Tensor,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    out: torch.Tensor | None = None,
    expected: float | None = None,
) -> torch.Tensor:
    counted, selected = rows_of(labels, mask, ignore_index)
    factors = grad * scales[0], grad * scales[1] * weight
    if out is not None and logits.device.type == "cpu":
        if expected is None or grad != expected:
            visit_adamix(logits, labels, counted, selected, label_smoothing, detach_target, factors, out)
        return out
    to = torch.empty_like(logits, memory_format=_DENSE) if out is None else out
    both, stats = passes(logits), stats.unflatten(1, (2, labels.shape[0]))

    def rewrite(at: At) -> None:
        maximum, logsum, *means = stats[_ALL + at]
        log_probs = restore(both[BOTH + at], maximum, logsum)
        probs = log_probs.exp()
        slopes = restored_slopes(log_probs[0], log_probs[1], probs[0], probs[1], *_each(means))
        target = torch.where(counted[at], labels[at], 0).long().unsqueeze(-1)
        write(passes(to), pair_grad(probs, slopes, target, counted[at], factors, label_smoothing), selected, at)

    by_blocks(rewrite, both[0])
    return to


def rescale(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    gradient.copy_(gradient.to(factor.dtype) * factor)


def linear_forward(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chunks of row pairs: logits, losses and gradients of one chunk live at a time."""

    def chunk(
        logits: torch.Tensor,
        labels: torch.Tensor,
        counted: torch.Tensor,
        selected: torch.Tensor,
        factors: torch.Tensor,
        need_grad: bool,
    ) -> Chunk:
        # Gradients take the logits' place; where those are narrower, they are rounded after the sum for the bias.
        wide = wide_dtype(logits.dtype)
        to = logits if logits.dtype == wide else logits.new_empty(logits.shape if need_grad else 0, dtype=wide)
        both = (factors[0], factors[1]) if need_grad else None
        rows = visit_adamix(logits, labels, counted, selected, label_smoothing, detach_target, both, to)
        entropy, consistency = keep(rows[0], counted).sum(), keep(rows[1], selected).sum()
        return Chunk(entropy, consistency, to if need_grad else None)

    return linear_loss(
        chunk, hidden, lm_head_weight, bias, labels, mask, num_items, weight, ignore_index,
        chunk_rows, need_hidden, need_weight, need_bias,
    )  # fmt: skip


def _scale(logits: torch.Tensor, mask: torch.Tensor | None, reduction: str) -> torch.Tensor:
    """What the sum over rows is multiplied by."""
    wide, rows = wide_dtype(logits.dtype), logits.shape[:-1].numel()
    if reduction == "batchmean" and mask is not None:
        return inverse(mask.sum(dtype=wide))
    return logits.new_full((), 1 / max(rows, 1) if reduction == "batchmean" else 1.0, dtype=wide)


def _adamix(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    expected: float | None,
    d_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    counted: torch.Tensor | None
    selected: torch.Tensor | None
    counted, selected = rows_of(labels, mask, ignore_index)
    scales = scales_of(counted, selected, num_items, wide_dtype(logits.dtype))
    if mask is None and all_count(counted):
        counted = selected = None
    factors = None if expected is None else (expected * scales[0], expected * scales[1] * weight)
    options = label_smoothing, detach_target
    entropy_rows, rows, *stats = visit_adamix(logits, labels, counted, selected, *options, factors, d_logits)
    cross_entropy = keep(entropy_rows, counted).sum() * scales[0]
    consistency = keep(rows, selected).sum() * scales[1]
    return cross_entropy + weight * consistency, cross_entropy, consistency, torch.stack(stats).flatten(1, 2), scales


def _each(means: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """E_p d and E_q d of [passes, ...] in a list, or what stands for none."""
    return (means[0][0], means[0][1]) if means else (None, None)
