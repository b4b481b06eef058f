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
from typing import Any

import torch

from . import _cpu
from ._blocks import At, by_blocks, rows_by_blocks
from ._chunks import Chunk, linear_loss
from ._cpu_direct import Direct
from ._rows import (
    cross_entropy_rows,
    divergence,
    divergence_grad,
    inverse,
    keep,
    pair_grad,
    restore,
    restored_slopes,
    rows_of,
    scales_of,
    softmax,
    wide_dtype,
)
from .signatures import AdaMix, AdaMixBackward, Consistency, ConsistencyBackward, Linear, split

_Means = tuple[torch.Tensor | None, torch.Tensor | None]
_DENSE = torch.contiguous_format
# Before a block's slices: both passes; all statistics of both.
_BOTH: At = (slice(None),)
_ALL = (slice(None), *_BOTH)


def writes_gradient(device_type: str, dtype: torch.dtype, expected: float | None) -> bool:
    return device_type == "cpu" and (dtype != torch.float16 or expected is not None)


direct = Direct(writes_gradient)


def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits_a, logits_b, mask, detach_target, reduction = Consistency(*arguments)

    def read(at: At) -> Sequence[torch.Tensor]:
        log_p, p, *stats_a = softmax(logits_a[at], not detach_target)
        log_q, q, *stats_b = softmax(logits_b[at], not detach_target)
        twice, slopes = divergence(log_p, log_q, p, q, not detach_target)
        pairs = zip([*stats_a, slopes.mean_p], [*stats_b, slopes.mean_q], strict=True)
        return [twice.mul_(0.5), *(t for pair in pairs for t in pair if t is not None)]

    rows, *stats = rows_by_blocks(read, logits_a)
    rows = rows if mask is None else keep(rows, mask)
    scale = rows.new_ones(())
    if reduction == "batchmean":
        scale = inverse(rows.new_full((), rows.numel()) if mask is None else mask.sum(dtype=rows.dtype))
    loss = rows if reduction == "none" else rows.sum() * scale
    return loss.contiguous(), torch.stack(stats), scale


def forward_grad(*arguments: Any) -> tuple[torch.Tensor, None, torch.Tensor]:
    *given, expected, da, db = arguments
    loss, scale = _cpu.consistency(Consistency(*given), expected, (da, db))
    return loss, None, scale


def backward(*arguments: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    a, out, expected = split(ConsistencyBackward, arguments)
    grad, logits_a, logits_b, mask, stats, scale, _ = a
    if out is not None and logits_a.device.type == "cpu":
        if expected is None or grad.item() != _cpu.as_stored(expected, grad.dtype):
            _cpu.consistency_again(a, out)
        return out
    da, db = (torch.empty_like(t, memory_format=_DENSE) for t in (logits_a, logits_b)) if out is None else out
    stats, coefficient = stats.unflatten(0, (-1, 2)), (grad * scale).unsqueeze(-1)
    each_row = coefficient.dim() > 1

    def write(at: At) -> None:
        maximum, logsum, *means = stats[_ALL + at]
        log_p, log_q = restore(logits_a[at], maximum[0], logsum[0]), restore(logits_b[at], maximum[1], logsum[1])
        p, q = log_p.exp(), log_q.exp()
        slopes = restored_slopes(log_p, log_q, p, q, *_each(means))
        grads = divergence_grad(p, q, slopes, coefficient[at] if each_row else coefficient)
        for to, g in zip((da, db), grads, strict=True):
            if to is not None:
                to[at] = g if mask is None else keep(g, mask[at].unsqueeze(-1))

    by_blocks(write, logits_a)
    return da, db


def adamix_forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target = AdaMix(*arguments)
    counted, selected = rows_of(labels, mask, ignore_index)
    both = _passes(logits)

    def read(at: At) -> Sequence[torch.Tensor]:
        log_probs, probs, *stats = softmax(both[_BOTH + at], not detach_target)
        entropy_rows = cross_entropy_rows(log_probs[0], labels[at], counted[at], label_smoothing)
        twice, slopes = divergence(log_probs[0], log_probs[1], probs[0], probs[1], not detach_target)
        means = [] if slopes.mean_p is None or slopes.mean_q is None else [torch.stack([slopes.mean_p, slopes.mean_q])]
        return [entropy_rows, twice.mul_(0.5), *stats, *means]

    entropy_rows, rows, *stats = rows_by_blocks(read, both[0])
    scales = scales_of(counted, selected, num_items, rows.dtype)
    cross_entropy = keep(entropy_rows, counted).sum() * scales[0]
    consistency = keep(rows, selected).sum() * scales[1]
    return cross_entropy + weight * consistency, cross_entropy, consistency, torch.stack(stats).flatten(1, 2), scales


def adamix_forward_grad(*arguments: Any) -> tuple[torch.Tensor | None, ...]:
    *given, expected, d_logits = arguments
    *losses, scales = _cpu.adamix(AdaMix(*given), expected, d_logits)
    return *losses, None, scales


def adamix_backward(*arguments: Any) -> torch.Tensor:
    a, out, expected = split(AdaMixBackward, arguments)
    grad, logits, labels, mask, stats, scales, weight, ignore_index, label_smoothing, _ = a
    if out is not None and logits.device.type == "cpu":
        if expected is None or grad.item() != _cpu.as_stored(expected, grad.dtype):
            _cpu.adamix_again(a, out)
        return out
    counted, selected = rows_of(labels, mask, ignore_index)
    entropy_scale, consistency_scale = grad * scales[0], grad * scales[1] * weight
    out = torch.empty_like(logits, memory_format=_DENSE) if out is None else out
    both, to, stats = _passes(logits), _passes(out), stats.unflatten(1, (2, labels.shape[0]))

    def write(at: At) -> None:
        maximum, logsum, *means = stats[_ALL + at]
        log_probs = restore(both[_BOTH + at], maximum, logsum)
        probs = log_probs.exp()
        slopes = restored_slopes(log_probs[0], log_probs[1], probs[0], probs[1], *_each(means))
        scales_here = entropy_scale, consistency_scale
        grads = pair_grad(probs, slopes, labels[at], counted[at], *scales_here, label_smoothing)
        for one, g in zip(to, grads, strict=True):
            one[at] = keep(g, selected[at].unsqueeze(-1))

    by_blocks(write, both[0])
    return out


def rescale(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    gradient.copy_(gradient.to(factor.dtype) * factor)


def linear_forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """Chunks of row pairs: logits, losses and gradients of one chunk live at a time."""
    return linear_loss(_chunk, Linear(*arguments))


def _chunk(
    a: Linear,
    logits: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor,
    selected: torch.Tensor,
    factors: torch.Tensor,
    need_grad: bool,
) -> Chunk:
    wide = wide_dtype(logits.dtype)
    # Gradients take the logits' place; where those are narrower, they are rounded after the sum for the bias.
    to = None
    if need_grad:
        to = logits if logits.dtype == wide else logits.new_empty(logits.shape, dtype=wide)
    visit = _cpu.linear_chunk if logits.device.type == "cpu" else _linear_chunk
    sums = visit(logits, labels, counted, selected, a.label_smoothing, a.detach_target, factors, to)
    return Chunk(*sums, to)


def _linear_chunk(
    logits: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor,
    selected: torch.Tensor,
    label_smoothing: float,
    detach_target: bool,
    factors: torch.Tensor,
    to: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums of the cross-entropy and of J); to: where the gradient goes, or None."""
    both = _passes(logits)

    def read(at: At) -> Sequence[torch.Tensor]:
        log_probs, probs, *_ = softmax(both[_BOTH + at], False)
        entropies = cross_entropy_rows(log_probs[0], labels[at], counted[at], label_smoothing)
        twice, slopes = divergence(log_probs[0], log_probs[1], probs[0], probs[1], not detach_target)
        if to is not None:
            grads = pair_grad(probs, slopes, labels[at], counted[at], factors[0], factors[1], label_smoothing)
            for one, g in zip(_passes(to), grads, strict=True):
                one[at] = keep(g, selected[at].unsqueeze(-1))
        return entropies, twice.mul_(0.5)

    entropies, each = rows_by_blocks(read, both[0])
    return keep(entropies, counted).sum(), keep(each, selected).sum()


def _passes(logits: torch.Tensor) -> torch.Tensor:
    """[2B, ..., V] -> [2, B, ..., V]."""
    return logits.unflatten(0, (2, logits.shape[0] // 2))


def _each(means: Sequence[torch.Tensor]) -> _Means:
    """E_p d and E_q d of [passes, ...] in a list, or what stands for none."""
    return (means[0][0], means[0][1]) if means else (None, None)
