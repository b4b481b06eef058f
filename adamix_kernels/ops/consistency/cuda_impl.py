"""C++/CUDA backend of the consistency losses: csrc/consistency.

Launches: forward one, with the gradient where one is wanted, and one that adds up the blocks' sums where there is more
than one block; a third where so many rows count that not every block can number them, or where a row pair fits into
no shared memory and rows are few. Backward one, whose blocks return at once where the forward's gradient is right
already. linear_adamix_loss: as many a chunk as a forward, and the gradient over the chunk's logits.
"""

from __future__ import annotations

import torch

from ..._extension import unsupported
from ._chunks import Chunk, linear_loss

__all__ = [
    "GRADIENT_DTYPES", "adamix_backward", "adamix_forward", "adamix_forward_grad", "backward", "forward",
    "forward_grad", "linear_forward", "rescale", "unsupported",
]  # fmt: skip

# float16 trains under a loss scale, for which a gradient written by the forward would be written again.
GRADIENT_DTYPES = (torch.bfloat16, torch.float32)
_ops = torch.ops.adamix_cuda


def forward(logits_a, logits_b, mask, detach_target, reduction):
    return _ops.consistency_forward(logits_a, logits_b, mask, detach_target, reduction, None, None)[:3]


def forward_grad(logits_a, logits_b, mask, detach_target, reduction, da, db):
    return _ops.consistency_forward(logits_a, logits_b, mask, detach_target, reduction, da, db)


def backward(grad, logits_a, logits_b, mask, stats, scale, detach_target, out=None):
    correct = out is not None
    if out is None:
        out = logits_a.new_empty(logits_a.shape), logits_b.new_empty(logits_b.shape)
    _ops.consistency_backward(grad, logits_a, logits_b, mask, stats, scale, detach_target, *out, correct)
    return out


def adamix_forward(logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target):
    options = weight, ignore_index, label_smoothing, detach_target
    return _ops.adamix_forward(logits, labels, mask, num_items, *options, None)[:5]


def adamix_forward_grad(
    logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target, d_logits
):  # fmt: skip
    options = weight, ignore_index, label_smoothing, detach_target
    return _ops.adamix_forward(logits, labels, mask, num_items, *options, d_logits)


def adamix_backward(
    grad, logits, labels, mask, stats, scales, weight, ignore_index, label_smoothing, detach_target, out=None
):  # fmt: skip
    correct = out is not None
    out = logits.new_empty(logits.shape) if out is None else out
    options = weight, ignore_index, label_smoothing, detach_target
    _ops.adamix_backward(grad, logits, labels, mask, stats, scales, *options, out, correct)
    return out


def rescale(gradient, factor):
    _ops.consistency_rescale(gradient, factor)


def linear_forward(
    hidden, lm_head_weight, bias, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target,
    chunk_rows, need_hidden, need_weight, need_bias,
):  # fmt: skip
    """The reference's chunks; a chunk's logits are overwritten by their gradient."""

    def chunk(logits, labels, counted, selected, factors, need_grad) -> Chunk:
        sums = _ops.adamix_chunk(
            logits, labels, selected, factors, ignore_index, label_smoothing, detach_target, need_grad
        )
        return Chunk(sums[0], sums[1], logits if need_grad else None)

    return linear_loss(
        chunk, hidden, lm_head_weight, bias, labels, mask, num_items, weight, ignore_index,
        chunk_rows, need_hidden, need_weight, need_bias,
    )  # fmt: skip
