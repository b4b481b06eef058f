"""The losses by definition, in PyTorch's own functions: rows that do not count are taken out, not masked."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Stands for -inf in a class that neither pass can choose: PyTorch's divergence is NaN there, and 0 is its limit.
_CLOSED = -1e30


def consistency(a, b, mask, detach_target, reduction, jitter=None):
    """1/2 [KL(b||a) + KL(a||b)] over the rows in the mask."""
    kept = torch.ones(a.shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
    values = pair_rows(jittered(a[kept], jitter), jittered(b[kept], jitter), detach_target, jitter)
    if reduction == "none":
        return torch.zeros(kept.shape, dtype=a.dtype).masked_scatter(kept, values)
    return _mean(values, len(values) if reduction == "batchmean" else 1)


def adamix(
    logits, labels, mask, weight=1.0, ignore_index=-100, label_smoothing=0.0, num_items=None, detach_target=True,
    inplace=False, jitter=None,
):  # fmt: skip
    """(loss, cross-entropy on pass 1, consistency of both passes)."""
    logits = jittered(logits, jitter)
    a, b = logits.chunk(2) if logits.shape[0] else (logits, logits)
    kept = labels != ignore_index if mask is None else mask.bool()
    counted = kept & (labels != ignore_index)
    entropy_rows = cross_entropy_rows(a[counted], labels[counted].long(), label_smoothing, jitter)
    pairs = pair_rows(a[kept], b[kept], detach_target, jitter)
    entropy = _mean(entropy_rows, len(entropy_rows) if num_items is None else num_items)
    divergence = _mean(pairs, len(pairs) if num_items is None else num_items)
    return entropy + weight * divergence, entropy, divergence


def linear(hidden, lm_head_weight, bias, labels, mask, **options):
    """The same of hidden lm_head_weight^T + bias, the logits in the hidden states' dtype."""
    kept = labels != options["ignore_index"] if mask is None else mask.bool()
    both = torch.cat([kept, kept]) if kept.dim() else kept
    logits = hidden.new_zeros(*hidden.shape[:-1], lm_head_weight.shape[0])
    logits = logits.masked_scatter(both.unsqueeze(-1), F.linear(hidden[both], lm_head_weight, bias))
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return adamix(logits.to(wide), labels, mask, **options)


def regression(predictions, labels, mask, weight, num_items, detach_target):
    """(loss, mean (a - y)^2, mean 1/2 (a - b)^2): the symmetric KL of unit-variance Gaussians around both passes."""
    a, b = predictions.chunk(2) if predictions.shape[0] else (predictions, predictions)
    kept = torch.ones(labels.shape, dtype=torch.bool) if mask is None else mask.bool()
    a, b, y = a[kept], b[kept], labels.to(a.dtype)[kept]
    p, q = (a.detach(), b.detach()) if detach_target else (a, b)
    count = len(y) if num_items is None else num_items
    error = _mean((a - y) ** 2, count)
    divergence = _mean(((a - q) ** 2 / 2 + (b - p) ** 2 / 2) / 2, count)
    return error + weight * divergence, error, divergence


def jittered(logits, generator):
    """logits, off by a rounding of a number as large as they and the logarithm of their sum; None: as they are."""
    if generator is None:
        return logits
    sign = torch.randint(-1, 2, logits.shape, generator=generator).to(logits.dtype)
    return logits + torch.finfo(logits.dtype).eps * sign * logits.detach().abs().nan_to_num(0, 0, 0).clamp(min=1)


class _RoundedLogSoftmax(torch.autograd.Function):
    """log_softmax, its result off by a rounding of its size: all together, as equal rows err, and each alone."""

    @staticmethod
    def forward(ctx, logits, generator):
        exact = F.log_softmax(logits, -1)
        sizes = exact.abs().nan_to_num(0, 0, 0).clamp(min=1)
        together, each = (torch.randint(-1, 2, shape, generator=generator) for shape in ((), exact.shape))
        rounded = exact + torch.finfo(exact.dtype).eps * sizes * (together + each)
        ctx.save_for_backward(rounded)
        return rounded

    @staticmethod
    def backward(ctx, grad):
        (rounded,) = ctx.saved_tensors
        return grad - rounded.exp() * grad.sum(-1, keepdim=True), None


def log_softmax(logits, generator):
    """generator: None, or what draws the roundings."""
    return F.log_softmax(logits, -1) if generator is None else _RoundedLogSoftmax.apply(logits, generator)


def cross_entropy_rows(logits, labels, label_smoothing, generator):
    """Of every row, [rows, V] and [rows]."""
    if generator is None:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    log_p = log_softmax(logits, generator)
    rows = F.nll_loss(log_p, labels, reduction="none")
    return (1 - label_smoothing) * rows - label_smoothing * log_p.mean(-1) if label_smoothing else rows


def pair_rows(a, b, detach_target, generator=None):
    """1/2 [KL(b||a) + KL(a||b)] of every row, [rows, V] each; the value without the cancellation of its definition."""
    closed = (a == -torch.inf) & (b == -torch.inf)
    log_p, log_q = (log_softmax(t.masked_fill(closed, _CLOSED), generator) for t in (a, b))
    targets = (log_q.detach(), log_p.detach()) if detach_target else (log_q, log_p)
    rows = sum(
        F.kl_div(mine, target, reduction="none", log_target=True).sum(-1) / 2
        for mine, target in zip((log_p, log_q), targets, strict=True)
    )
    if a.dtype != torch.float64:
        return rows
    value = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).detach() / 2
    return torch.where(rows.isfinite(), value + (rows - rows.detach()), rows)


def _mean(rows, count):
    """The sum over `count`; a count of 0 makes 0 of every finite sum."""
    count = float(count)
    return rows.sum() * (1 / count if count > 0 else 0.0)
