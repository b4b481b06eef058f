"""linear_adamix_loss by chunks of rows: what every backend shares around the loss of one chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ._rows import keep, rows_of, scales_of, wide_dtype


class Chunk(NamedTuple):
    """Sums over a chunk's rows, and the gradient of its logits [2 * rows, V] or None."""

    cross_entropy: torch.Tensor
    consistency: torch.Tensor
    d_logits: torch.Tensor | None


def linear_loss(
    chunk: Callable[..., Chunk],
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, cross-entropy, consistency, d_hidden, d_weight, d_bias, factor).

    chunk(logits, labels, counted, selected, factors, need_grad): the loss of some row pairs; logits
    [2 * rows, V] are its to overwrite, factors [2] those of both parts' gradients.

    float16 gradients are held divided by the larger of both parts' factors on a row (1/rows would underflow, a
    weight overflow): that factor, else 1, is returned, and backward applies it with the incoming gradient.
    """
    vocab, width = lm_head_weight.shape
    counted, selected = (rows.reshape(-1) for rows in rows_of(labels, mask, ignore_index))
    labels = labels.reshape(-1)
    pairs = hidden.reshape(2, labels.shape[0], width)
    dtype = wide_dtype(hidden.dtype)
    scales = scales_of(counted, selected, num_items, dtype)
    factors = torch.stack([scales[0], scales[1] * weight])
    factor = factors.amax() if hidden.dtype == torch.float16 else factors.new_ones(())
    factors = torch.where(factor > 0, factors / factor, 0)
    # Added up at the end: one rounding a chunk, all in one direction, would be more than PyTorch errs.
    sums = torch.zeros(2, -(-labels.shape[0] // chunk_rows), dtype=dtype, device=hidden.device)
    d_hidden = torch.empty_like(pairs, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
    d_weight = hidden.new_zeros((vocab, width) if need_weight else 0, dtype=dtype)
    d_bias = hidden.new_zeros(vocab if need_bias else 0, dtype=dtype)
    need_grad = need_hidden or need_weight or need_bias
    for number, start in enumerate(range(0, labels.shape[0], chunk_rows)):
        part = slice(start, start + chunk_rows)
        # A masked row's hidden states may be NaN: zero them, or 0 * NaN reaches d_weight.
        x = keep(pairs[:, part], selected[part].unsqueeze(-1)).flatten(0, 1)
        logits = torch.nn.functional.linear(x, lm_head_weight, bias)
        out = chunk(logits, labels[part], counted[part], selected[part], factors, need_grad)
        sums[0, number] = out.cross_entropy
        sums[1, number] = out.consistency
        if not need_grad:
            del x, logits, out
            continue
        assert out.d_logits is not None  # asked for
        if need_bias:
            d_bias += out.d_logits.sum(0, dtype=dtype)
        d_logits = out.d_logits.to(hidden.dtype)
        if need_hidden:
            d_hidden[:, part] = (d_logits @ lm_head_weight).unflatten(0, (2, -1))
        if need_weight and hidden.dtype == torch.bfloat16:
            d_weight += d_logits.t() @ x
        elif need_weight:
            # float16 would overflow in a sum over many rows, before the factor makes it small.
            d_weight.addmm_(d_logits.t().to(dtype), x.to(dtype))
        # Or the next chunk's logits are made while these still live.
        del x, logits, out, d_logits
    totals = sums.sum(1)
    cross_entropy, consistency = totals[0] * scales[0], totals[1] * scales[1]
    loss = cross_entropy + weight * consistency
    if need_hidden:
        d_hidden = d_hidden.view(hidden.shape)
    return loss, cross_entropy, consistency, d_hidden, d_weight, d_bias, factor
