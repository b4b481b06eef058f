"""Triton backend of the consistency losses.

Launches: forward two (rows or parts of rows, then the sum), one where few programs do it all (few classes and
rows); backward one. The logits are read once in the forward, read and their gradient written once in the
backward. linear_adamix_loss: one launch a chunk, which reads the chunk's logits and writes their gradient over
them.
"""

from __future__ import annotations

import torch

from ...._triton_utils import launch
from ...._triton_utils import problem as unsupported
from .._chunks import Chunk, linear_loss
from .backward import pair_grad_kernel
from .forward import pair_finish_kernel, pair_parts_kernel, pair_rows_kernel
from .plan import ALONE, MAX_REGISTERS, PART_ROWS, SUM_ROWS, Rows, as_pairs, make_rows, make_tiles, two_strides

__all__ = ["adamix_backward", "adamix_forward", "backward", "forward", "linear_forward", "unsupported"]


def forward(logits_a, logits_b, mask, detach_target, reduction):
    rows = make_rows(logits_a, logits_b, None, mask)
    stats = _wide(logits_a, 4 if detach_target else 6, *logits_a.shape[:-1])
    losses = _wide(logits_a, *logits_a.shape[:-1])
    loss, scale = None if reduction == "none" else _wide(logits_a), _wide(logits_a)
    _forward(rows, None, stats, losses, (loss, None, None, scale), reduction == "batchmean", 0, 0.0, 0.0, detach_target)
    return losses if loss is None else loss, stats, scale


def backward(grad, logits_a, logits_b, mask, stats, scale, detach_target):
    rows = make_rows(logits_a, logits_b, None, mask)
    da, db = logits_a.new_empty(logits_a.shape), logits_b.new_empty(logits_b.shape)
    _backward(rows, grad, stats, scale, da, db, 1.0, 0, 0.0, detach_target)
    return da, db


def adamix_forward(logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target):
    half = labels.shape[0]
    rows = make_rows(logits[:half], logits[half:], labels, mask)
    stats = _wide(logits, 2 if detach_target else 3, *logits.shape[:-1])
    loss, cross_entropy, consistency = (_wide(logits) for _ in range(3))
    scales, losses = _wide(logits, 2), _wide(logits, 2, *labels.shape)
    out = loss, cross_entropy, consistency, scales
    _forward(rows, num_items, stats, losses, out, True, ignore_index, label_smoothing, weight, detach_target)
    return loss, cross_entropy, consistency, stats, scales


def adamix_backward(
    grad, logits, labels, mask, stats, scales, weight, ignore_index, label_smoothing, detach_target
):  # fmt: skip
    half = labels.shape[0]
    rows = make_rows(logits[:half], logits[half:], labels, mask)
    out = logits.new_empty(logits.shape)
    _backward(
        rows, grad, stats, scales, out[:half], out[half:], weight, ignore_index, label_smoothing, detach_target
    )  # fmt: skip
    return out


def linear_forward(
    hidden, lm_head_weight, bias, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target,
    chunk_rows, need_hidden, need_weight, need_bias,
):  # fmt: skip
    """The reference's chunks; a chunk's logits are overwritten by their gradient."""

    def chunk(logits, labels, counted, selected, factors, need_grad) -> Chunk:
        half = labels.shape[0]
        rows = make_rows(logits[:half], logits[half:], labels, selected)
        losses = _wide(logits, 2, half)
        grads = (logits[:half], logits[half:]) if need_grad else (None, None)
        _rows(rows, None, losses, factors, *grads, ignore_index, label_smoothing, detach_target)
        return Chunk(losses[0].sum(), losses[1].sum(), logits if need_grad else None)

    return linear_loss(
        chunk, hidden, lm_head_weight, bias, labels, mask, num_items, weight, ignore_index,
        chunk_rows, need_hidden, need_weight, need_bias,
    )  # fmt: skip


def _forward(rows: Rows, num_items, stats, losses, out, mean, ignore_index, smoothing, weight, detach_target):
    *_, classes = sizes = rows.sizes
    tiles, parts, source = make_tiles(rows.count, classes), None, "rows"
    device = rows.a.device
    if tiles.splits > 1:
        source, parts = "parts", _wide(rows.a, tiles.splits, 7, rows.count)
        launch(
            pair_parts_kernel, (tiles.tiles, tiles.splits), device,
            *rows, parts, *sizes, ignore_index, tiles.share // tiles.cols,
            SMOOTH=smoothing > 0, ROWS=tiles.rows, COLS=tiles.cols, num_warps=tiles.num_warps,
            maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    elif tiles.tiles <= ALONE and classes <= tiles.cols:
        source = "logits"
    else:
        _rows(rows, stats, losses, None, None, None, ignore_index, smoothing, detach_target)
    height = {"logits": tiles.rows, "parts": PART_ROWS, "rows": SUM_ROWS}[source]
    launch(
        pair_finish_kernel, (1,), device,
        *rows, parts, num_items, stats, losses, *out, *sizes, ignore_index, smoothing, weight,
        tiles.splits, tiles.share, SOURCE=source, MEAN=mean, SMOOTH=smoothing > 0, FULL=not detach_target,
        ROWS=height, COLS=tiles.cols, num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def _rows(rows: Rows, stats, losses, scales, da, db, ignore_index, smoothing, detach_target):
    *_, classes = sizes = rows.sizes
    tiles = make_tiles(rows.count, classes)
    launch(
        pair_rows_kernel, (tiles.tiles,), rows.a.device,
        *rows, scales, stats, losses, da, db, *sizes, ignore_index, smoothing,
        SMOOTH=smoothing > 0, FULL=not detach_target, ROWS=tiles.rows, COLS=tiles.cols, num_warps=tiles.num_warps,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def _backward(rows: Rows, grad, stats, scales, da, db, weight, ignore_index, smoothing, detach_target):
    *sizes, classes = rows.sizes
    tiles = make_tiles(rows.count, classes)
    grad = as_pairs(grad)
    # A scalar is every row's.
    strides = two_strides(grad if grad.numel() > 1 else None)
    launch(
        pair_grad_kernel, (tiles.tiles, -(-classes // tiles.cols)), da.device,
        grad, *rows, stats, scales, da, db, *sizes, *strides, classes, ignore_index, smoothing, weight,
        FULL=not detach_target, ROWS=tiles.rows, COLS=tiles.cols, num_warps=tiles.num_warps,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def _wide(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
