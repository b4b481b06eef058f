"""Reference backend of the consistency losses: explicit forward and backward in plain PyTorch.

a and b are the two passes' logits, p and q their softmaxes, d = log p - log q. Leading dimensions are
rows and are never flattened or compacted, so sliced logits cost no copy.
"""

from __future__ import annotations

import torch

from ._rows import divergence, divergence_grad, inverse, keep, log_softmax, restore, wide_dtype


def forward(logits_a, logits_b, mask, detach_target, reduction):
    log_p, max_a, sum_a = log_softmax(logits_a)
    log_q, max_b, sum_b = log_softmax(logits_b)
    rows, mean_p, mean_q = divergence(log_p, log_q, log_p.exp(), log_q.exp(), not detach_target)
    rows = rows if mask is None else keep(rows, mask)
    stats = [max_a, max_b, sum_a, sum_b] + ([] if detach_target else [mean_p, mean_q])
    scale = rows.new_ones(())
    if reduction == "batchmean":
        scale = inverse(rows.new_full((), rows.numel()) if mask is None else mask.sum(dtype=rows.dtype))
    loss = rows if reduction == "none" else rows.sum() * scale
    return loss.contiguous(), torch.stack(stats), scale


def backward(grad, logits_a, logits_b, mask, stats, scale, detach_target):
    log_p = restore(logits_a, stats[0], stats[2])
    log_q = restore(logits_b, stats[1], stats[3])
    means = (None, None) if detach_target else (stats[4], stats[5])
    coefficient = (grad * scale).unsqueeze(-1)
    ga, gb = divergence_grad(log_p, log_q, log_p.exp(), log_q.exp(), *means, coefficient)
    if mask is not None:
        ga, gb = keep(ga, mask.unsqueeze(-1)), keep(gb, mask.unsqueeze(-1))
    return ga.to(logits_a.dtype).contiguous(), gb.to(logits_b.dtype).contiguous()


def adamix_forward(logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target):
    counted, selected = _rows_of(labels, mask, ignore_index)
    log_probs, maximum, logsum = log_softmax(logits)
    half = labels.shape[0]
    entropy_rows = _cross_entropy(log_probs[:half], labels, counted, label_smoothing)
    rows, mean_p, mean_q = divergence(*_halves(log_probs, half), *_halves(log_probs.exp(), half), not detach_target)
    scales = _scales(counted, selected, num_items, rows.dtype)
    cross_entropy = keep(entropy_rows, counted).sum() * scales[0]
    consistency = keep(rows, selected).sum() * scales[1]
    stats = [maximum, logsum] + ([] if detach_target else [torch.cat([mean_p, mean_q])])
    return cross_entropy + weight * consistency, cross_entropy, consistency, torch.stack(stats), scales


def adamix_backward(
    grad, logits, labels, mask, stats, scales, weight, ignore_index, label_smoothing, detach_target
):  # fmt: skip
    counted, selected = _rows_of(labels, mask, ignore_index)
    log_probs = restore(logits, stats[0], stats[1])
    half = labels.shape[0]
    means = (None, None) if detach_target else (stats[2][:half], stats[2][half:])
    entropy_scale, consistency_scale = grad * scales[0], grad * scales[1] * weight
    pair = (*_halves(log_probs, half), *_halves(log_probs.exp(), half))
    ga, gb = _pair_grad(pair, means, labels, counted, entropy_scale, consistency_scale, label_smoothing)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    out[:half] = keep(ga, selected.unsqueeze(-1))
    out[half:] = keep(gb, selected.unsqueeze(-1))
    return out


def linear_forward(
    hidden, lm_head_weight, bias, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target,
    chunk_rows, need_hidden, need_weight, need_bias,
):  # fmt: skip
    """Chunks of row pairs: logits, losses and gradients of one chunk live at a time.

    Gradients are held divided by the larger of both parts' factors on a row (1/rows would underflow in
    float16, a weight overflow): that factor is returned, and backward applies it with the incoming gradient.
    """
    vocab, width = lm_head_weight.shape
    counted, selected = (rows.reshape(-1) for rows in _rows_of(labels, mask, ignore_index))
    labels = labels.reshape(-1)
    pairs = hidden.reshape(2, labels.shape[0], width)
    dtype = wide_dtype(hidden.dtype)
    scales = _scales(counted, selected, num_items, dtype)
    factors = torch.stack([scales[0], scales[1] * weight])
    factor = factors.amax()
    factors = torch.where(factor > 0, factors / factor, 0)
    sums = torch.zeros(2, dtype=dtype, device=hidden.device)
    d_hidden = torch.empty_like(pairs, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
    d_weight = hidden.new_zeros((vocab, width) if need_weight else 0, dtype=dtype)
    d_bias = hidden.new_zeros(vocab if need_bias else 0, dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, labels.shape[0], chunk_rows):
            part = slice(start, start + chunk_rows)
            chosen = selected[part].unsqueeze(-1)
            # A masked row's hidden states may be NaN: zero them, or 0 * NaN reaches d_weight.
            x = keep(pairs[:, part], chosen).flatten(0, 1)
            logits = torch.nn.functional.linear(x, lm_head_weight, bias)
            log_probs = torch.log_softmax(logits, -1, dtype=dtype)
            half = log_probs.shape[0] // 2
            pair = (*_halves(log_probs, half), *_halves(log_probs.exp(), half))
            rows, *means = divergence(*pair, not detach_target)
            entropy_rows = _cross_entropy(pair[0], labels[part], counted[part], label_smoothing)
            sums[0] += keep(entropy_rows, counted[part]).sum()
            sums[1] += keep(rows, selected[part]).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            grads = _pair_grad(pair, means, labels[part], counted[part], *factors, label_smoothing)
            d_logits = torch.cat([keep(g, chosen) for g in grads])
            if need_bias:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if need_hidden:
                d_hidden[:, part] = (d_logits @ lm_head_weight).view(2, -1, width)
            if need_weight and hidden.dtype == torch.bfloat16:
                d_weight += d_logits.t() @ x
            elif need_weight:
                # float16 would overflow in a sum over many rows, before the factor makes it small.
                d_weight.addmm_(d_logits.t().to(dtype), x.to(dtype))
    cross_entropy, consistency = sums[0] * scales[0], sums[1] * scales[1]
    loss = cross_entropy + weight * consistency
    if need_hidden:
        d_hidden = d_hidden.view(hidden.shape)
    return loss, cross_entropy, consistency, d_hidden, d_weight, d_bias, factor


def _rows_of(labels, mask, ignore_index):
    """(rows of the cross-entropy, rows of the consistency); the first are among the second."""
    labelled = labels != ignore_index
    return (labelled, labelled) if mask is None else (labelled & mask, mask)


def _scales(counted, selected, num_items, dtype):
    """[2]: one over the number of cross-entropy rows and of consistency rows, 0 where there are none."""
    if num_items is not None:
        return inverse(num_items.to(dtype)).expand(2).contiguous()
    return inverse(torch.stack([counted.sum(dtype=dtype), selected.sum(dtype=dtype)]))


def _cross_entropy(log_p, labels, counted, label_smoothing):
    """-(1 - s) log p[label] - s mean(log p), per row; meaningless where not counted."""
    rows = log_p.gather(-1, torch.where(counted, labels, 0).long().unsqueeze(-1)).squeeze(-1).neg()
    if label_smoothing:
        rows = (1 - label_smoothing) * rows - label_smoothing * log_p.mean(-1)
    return rows


def _halves(values, half):
    return values[:half], values[half:]


def _pair_grad(pair, means, labels, counted, entropy_scale, consistency_scale, label_smoothing):
    """Gradient on a and on b; pair: log p, log q, p, q; scales: a 0-dim tensor, and one or a number."""
    p = pair[2]
    ga, gb = divergence_grad(*pair, *means, consistency_scale)
    share = torch.where(counted, entropy_scale, 0).unsqueeze(-1)
    ga.addcmul_(p, share)
    if label_smoothing:
        ga.sub_(share * (label_smoothing / p.shape[-1]))
    target = torch.where(counted, labels, 0).long().unsqueeze(-1)
    return ga.scatter_add_(-1, target, share * (label_smoothing - 1)), gb
