"""Reference backend of the consistency losses: explicit forward and backward in plain PyTorch.

a and b are the two passes' logits, p and q their softmaxes, d = log p - log q. Leading dimensions are
rows and are never flattened or compacted, so sliced logits cost no copy.

What a backend module holds; arguments are checked and on one device, logits have any strides:
    unsupported(device_type, dtype) -> why it cannot serve them, or None (not here: the reference serves all).
    GRADIENT_DTYPES: dtypes whose gradient the forward's own launch writes in eager mode; for others, two steps.
    forward(logits_a, logits_b, mask, detach_target, reduction) -> (loss, stats, scale)
    forward_grad(.., reduction, da, db) -> (loss, stats, scale, factor); the reduction is no "none"
    backward(grad, logits_a, logits_b, mask, stats, scale, detach_target, out=None) -> (da, db)
    adamix_forward(logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target)
        -> (loss, cross-entropy, consistency, stats, scales)
    adamix_forward_grad(.., detach_target, d_logits) -> (.., scales, factor)
    adamix_backward(grad, logits, labels, mask, stats, scales, weight, ignore_index, label_smoothing,
        detach_target, out=None) -> d_logits
    rescale(gradient, factor): gradient *= factor, in place; no write where the factor is exactly 1.
    linear_forward(..): `_chunks.linear_loss` around the module's own loss of one chunk.
stats: [4 or 6, ...] or [2 or 3, 2B, ...]: row maxima, logs of sums of exp(x - maximum), E_p d and E_q d unless
detached. scale(s): one over the rows of each part, 1 for "sum" and "none".
da, db (None: not wanted), d_logits: written with the gradient for an incoming one of 1, divided by factor, a 0-dim
tensor: 1, but for float16 the larger of both parts' coefficients. They are contiguous, or the logits themselves.
out: such gradients (factor 1), which stay as they are where the device scalar grad is exactly 1; None: new tensors.
"""

from __future__ import annotations

import torch

from ._chunks import Chunk, linear_loss
from ._rows import (
    divergence,
    divergence_grad,
    held,
    inverse,
    keep,
    log_softmax,
    restore,
    rows_of,
    scales_of,
    wide_dtype,
)

GRADIENT_DTYPES = ()


def forward(
    logits_a: torch.Tensor, logits_b: torch.Tensor, mask: torch.Tensor | None, detach_target: bool, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_p, max_a, sum_a = log_softmax(logits_a, not detach_target)
    log_q, max_b, sum_b = log_softmax(logits_b, not detach_target)
    rows, mean_p, mean_q = divergence(log_p, log_q, log_p.exp(), log_q.exp(), not detach_target)
    rows = rows if mask is None else keep(rows, mask)
    stats = [max_a, max_b, sum_a, sum_b] + [mean for mean in (mean_p, mean_q) if mean is not None]
    scale = rows.new_ones(())
    if reduction == "batchmean":
        scale = inverse(rows.new_full((), rows.numel()) if mask is None else mask.sum(dtype=rows.dtype))
    loss = rows if reduction == "none" else rows.sum() * scale
    return loss.contiguous(), torch.stack(stats), scale


def forward_grad(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    reduction: str,
    da: torch.Tensor | None,
    db: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, stats, scale = forward(logits_a, logits_b, mask, detach_target, reduction)
    scale_held, factor = held(scale, 1.0, logits_a.dtype)
    backward(loss.new_ones(()), logits_a, logits_b, mask, stats, scale_held, detach_target, (da, db))
    return loss, stats, scale, factor


def backward(
    grad: torch.Tensor,
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    stats: torch.Tensor,
    scale: torch.Tensor,
    detach_target: bool,
    out: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    log_p = restore(logits_a, stats[0], stats[2])
    log_q = restore(logits_b, stats[1], stats[3])
    means = (None, None) if detach_target else (stats[4], stats[5])
    coefficient = (grad * scale).unsqueeze(-1)
    ga, gb = divergence_grad(log_p, log_q, log_p.exp(), log_q.exp(), means[0], means[1], coefficient)
    if mask is not None:
        ga, gb = keep(ga, mask.unsqueeze(-1)), keep(gb, mask.unsqueeze(-1))
    if out is None:
        return ga.to(logits_a.dtype).contiguous(), gb.to(logits_b.dtype).contiguous()
    da, db = out
    return None if da is None else da.copy_(ga), None if db is None else db.copy_(gb)


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
    counted, selected = rows_of(labels, mask, ignore_index)
    log_probs, maximum, logsum = log_softmax(logits, not detach_target)
    half = labels.shape[0]
    entropy_rows = _cross_entropy(log_probs[:half], labels, counted, label_smoothing)
    rows, mean_p, mean_q = divergence(*_halves(log_probs, half), *_halves(log_probs.exp(), half), not detach_target)
    scales = scales_of(counted, selected, num_items, rows.dtype)
    cross_entropy = keep(entropy_rows, counted).sum() * scales[0]
    consistency = keep(rows, selected).sum() * scales[1]
    stats = [maximum, logsum] + ([] if mean_p is None or mean_q is None else [torch.cat([mean_p, mean_q])])
    return cross_entropy + weight * consistency, cross_entropy, consistency, torch.stack(stats), scales


def adamix_forward_grad(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    d_logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = weight, ignore_index, label_smoothing, detach_target
    loss, cross_entropy, consistency, stats, scales = adamix_forward(logits, labels, mask, num_items, *options)
    scales_held, factor = held(scales, weight, logits.dtype)
    adamix_backward(scales.new_ones(()), logits, labels, mask, stats, scales_held, *options, d_logits)
    return loss, cross_entropy, consistency, stats, scales, factor


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
) -> torch.Tensor:
    counted, selected = rows_of(labels, mask, ignore_index)
    log_probs = restore(logits, stats[0], stats[1])
    half = labels.shape[0]
    means = (None, None) if detach_target else (stats[2][:half], stats[2][half:])
    entropy_scale, consistency_scale = grad * scales[0], grad * scales[1] * weight
    pair = (*_halves(log_probs, half), *_halves(log_probs.exp(), half))
    ga, gb = _pair_grad(pair, means, labels, counted, entropy_scale, consistency_scale, label_smoothing)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    out[:half] = keep(ga, selected.unsqueeze(-1))
    out[half:] = keep(gb, selected.unsqueeze(-1))
    return out


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
        factors: tuple[torch.Tensor, torch.Tensor | float],
        need_grad: bool,
    ) -> Chunk:
        log_probs = torch.log_softmax(logits, -1, dtype=wide_dtype(logits.dtype))
        half = log_probs.shape[0] // 2
        pair = (*_halves(log_probs, half), *_halves(log_probs.exp(), half))
        rows, mean_p, mean_q = divergence(*pair, not detach_target)
        entropy_rows = _cross_entropy(pair[0], labels, counted, label_smoothing)
        d_logits = None
        if need_grad:
            grads = _pair_grad(pair, (mean_p, mean_q), labels, counted, *factors, label_smoothing)
            d_logits = torch.cat([keep(g, selected.unsqueeze(-1)) for g in grads])
        return Chunk(keep(entropy_rows, counted).sum(), keep(rows, selected).sum(), d_logits)

    return linear_loss(
        chunk, hidden, lm_head_weight, bias, labels, mask, num_items, weight, ignore_index,
        chunk_rows, need_hidden, need_weight, need_bias,
    )  # fmt: skip


def _cross_entropy(
    log_p: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """-(1 - s) log p[label] - s mean(log p), per row; meaningless where not counted."""
    rows = log_p.gather(-1, torch.where(counted, labels, 0).long().unsqueeze(-1)).squeeze(-1).neg()
    if label_smoothing:
        rows = (1 - label_smoothing) * rows - label_smoothing * log_p.mean(-1)
    return rows


def _halves(values: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    return values[:half], values[half:]


def _pair_grad(
    pair: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    means: tuple[torch.Tensor | None, torch.Tensor | None],
    labels: torch.Tensor,
    counted: torch.Tensor,
    entropy_scale: torch.Tensor,
    consistency_scale: torch.Tensor | float,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient on a and on b; pair: log p, log q, p, q; scales: a 0-dim tensor, and one or a number."""
    p = pair[2]
    ga, gb = divergence_grad(*pair, *means, consistency_scale)
    share = torch.where(counted, entropy_scale, 0).unsqueeze(-1)
    ga.addcmul_(p, share)
    if label_smoothing:
        ga.sub_(share * (label_smoothing / p.shape[-1]))
    target = torch.where(counted, labels, 0).long().unsqueeze(-1)
    return ga.scatter_add_(-1, target, share * (label_smoothing - 1)), gb
