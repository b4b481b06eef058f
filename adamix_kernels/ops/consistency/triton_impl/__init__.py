"""Triton backend of the consistency losses.

Launches: forward one, with the gradient where one is wanted; a second one only where few rows are split over their
classes (the gradient, after the statistics) or so many rows count that one program numbers them first. Backward one,
whose programs return at once where the forward's gradient is right already. The logits are read once, for the
gradient once more (from L2 where the rows fit), and their gradient is written once. linear_adamix_loss: one launch a
chunk, which reads the chunk's logits and writes their gradient over them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...._triton_utils import launch
from ...._triton_utils import problem as unsupported
from .._chunks import Chunk, linear_loss
from .backward import pair_grad_kernel, rescale_kernel
from .finish import pair_count_kernel
from .forward import pair_parts_kernel, pair_rows_kernel
from .plan import (
    ALONE,
    GRID,
    MAX_REGISTERS,
    PART_ROWS,
    Rows,
    as_pairs,
    as_rows,
    counts_alone,
    make_rows,
    make_tiles,
    two_strides,
)

__all__ = [
    "adamix_backward", "adamix_forward", "adamix_forward_grad", "backward", "forward",
    "forward_grad", "linear_forward", "rescale", "unsupported", "writes_gradient",
]  # fmt: skip


class Options(NamedTuple):
    """What every launch takes beside tensors."""

    weight: float
    ignore_index: int
    smoothing: float
    detach_target: bool

    @property
    def meta(self) -> dict[str, bool]:
        return dict(FULL=not self.detach_target, maxnreg=MAX_REGISTERS)


def writes_gradient(device_type, dtype, expected):
    """Not for an incoming gradient other than 1, nor for float16, which waits for its loss scale."""
    return dtype != torch.float16 and expected in (None, 1.0)


def forward(logits_a, logits_b, mask, detach_target, reduction):
    return _consistency(logits_a, logits_b, mask, detach_target, reduction, None, None)[:3]


def forward_grad(logits_a, logits_b, mask, detach_target, reduction, expected, da, db):
    return _consistency(logits_a, logits_b, mask, detach_target, reduction, da, db)[:3]


def backward(grad, logits_a, logits_b, mask, stats, scale, detach_target, out=None, expected=None):
    rows = make_rows(logits_a, logits_b, None, mask)
    if out is None:
        out = logits_a.new_empty(logits_a.shape), logits_b.new_empty(logits_b.shape)
    options = Options(1.0, 0, 0.0, detach_target)
    _rewrite(rows, (logits_a, logits_b), grad, stats, scale, out, options, expected)
    return out


def adamix_forward(logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target):
    options = Options(weight, ignore_index, label_smoothing, detach_target)
    return _adamix(logits, labels, mask, num_items, options, None)[:5]


def adamix_forward_grad(
    logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target, expected, d_logits
):  # fmt: skip
    options = Options(weight, ignore_index, label_smoothing, detach_target)
    return _adamix(logits, labels, mask, num_items, options, d_logits)[:5]


def adamix_backward(
    grad, logits, labels, mask, stats, scales, weight, ignore_index, label_smoothing, detach_target, out=None,
    expected=None,
):  # fmt: skip
    half = labels.shape[0]
    rows = make_rows(logits[:half], logits[half:], labels, mask)
    out = logits.new_empty(logits.shape) if out is None else out
    options = Options(weight, ignore_index, label_smoothing, detach_target)
    both, to = (logits[:half], logits[half:]), (out[:half], out[half:])
    _rewrite(rows, both, grad, stats, scales, to, options, expected)
    return out


def rescale(gradient, factor):
    x = as_rows(gradient)
    tiles = make_tiles(x.shape[0] * x.shape[1], x.shape[2])
    col_tiles = -(-x.shape[2] // tiles.cols)
    launch(
        rescale_kernel, (min(tiles.tiles * col_tiles, GRID),), x.device,
        x, factor, x.shape[0] * x.shape[1], max(1, x.shape[1]), *x.stride()[:2], x.shape[2], tiles.tiles, col_tiles,
        ROWS=tiles.rows, COLS=tiles.cols, num_warps=tiles.num_warps,
    )  # fmt: skip
    _put_back(gradient, x)


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
        options = Options(1.0, ignore_index, label_smoothing, detach_target)
        _rows(rows, None, (factors, None, losses), grads, None, options, COUNT=False, MEAN=True, INPLACE=need_grad)
        return Chunk(losses[0], losses[1], logits if need_grad else None)

    return linear_loss(
        chunk, hidden, lm_head_weight, bias, labels, mask, num_items, weight, ignore_index,
        chunk_rows, need_hidden, need_weight, need_bias,
    )  # fmt: skip


def _consistency(logits_a, logits_b, mask, detach_target, reduction, da, db):
    rows = make_rows(logits_a, logits_b, None, mask)
    stats = _wide(logits_a, 4 if detach_target else 6, *logits_a.shape[:-1])
    losses, scale = _wide(logits_a, *logits_a.shape[:-1]), _wide(logits_a)
    options, factor = Options(1.0, 0, 0.0, detach_target), None
    if reduction == "none":
        _forward(rows, None, (scale.fill_(1.0), stats, losses), (None, None), None, options, mean=False)
        return losses, stats, scale, factor
    loss, factor = _wide(logits_a), _wide(logits_a)
    into = (_over(rows.a, logits_a, da), _over(rows.b, logits_b, db))
    out = loss, None, None, factor
    _forward(rows, None, (scale, stats, losses), into, out, options, mean=reduction == "batchmean")
    _put_back(da, into[0])
    _put_back(db, into[1])
    return loss, stats, scale, factor


def _adamix(logits, labels, mask, num_items, options, d_logits):
    half = labels.shape[0]
    rows = make_rows(logits[:half], logits[half:], labels, mask)
    stats = _wide(logits, 2 if options.detach_target else 3, *logits.shape[:-1])
    loss, cross_entropy, consistency, factor = (_wide(logits) for _ in range(4))
    scales, losses, into = _wide(logits, 2), _wide(logits, 2, *labels.shape), (None, None)
    if d_logits is not None:
        da, db = d_logits[:half], d_logits[half:]
        into = _over(rows.a, logits[:half], da), _over(rows.b, logits[half:], db)
    out = loss, cross_entropy, consistency, factor
    _forward(rows, num_items, (scales, stats, losses), into, out, options, mean=True)
    if d_logits is not None:
        _put_back(da, into[0])
        _put_back(db, into[1])
    return loss, cross_entropy, consistency, stats, scales, factor


def _forward(rows: Rows, num_items, found, into, out, options: Options, mean):
    """found: (scales, statistics, row losses); into: the gradients or Nones; out: the scalars, None for row losses."""
    *_, classes = rows.sizes
    tiles = make_tiles(rows.count, classes)
    inplace = any(g is rows.a or g is rows.b for g in into)
    if tiles.splits == 1:
        count = not mean or all(g is None for g in into) or counts_alone(rows, num_items, tiles)
        _rows(rows, num_items, found, into, out, options, COUNT=count, MEAN=mean, INPLACE=inplace)
        return
    scales, stats, _ = found
    parts = _wide(rows.a, tiles.splits, 7, rows.count)
    launch(
        pair_parts_kernel, (tiles.tiles, tiles.splits), rows.a.device,
        *rows, num_items, *found, parts, *(out or (None,) * 4), _ticket(rows.a), *rows.sizes, *options[1:3],
        options.weight, tiles.share // tiles.cols, tiles.splits, tiles.share,
        FINISH=out is not None, MEAN=mean, SMOOTH=options.smoothing > 0, ROWS=tiles.rows, COLS=tiles.cols,
        PART_ROWS=PART_ROWS, num_warps=tiles.num_warps, **options.meta,
    )  # fmt: skip
    if any(g is not None for g in into):
        held = rows.a.dtype == torch.float16
        _gradient(rows, None, stats, scales, *into, options, INPLACE=inplace, HELD=held)


def _rows(rows: Rows, num_items, found, into, out, options: Options, **meta):
    tiles = make_tiles(rows.count, rows.sizes[-1])
    grid, ticket = min(tiles.tiles, GRID), None
    if out is not None:
        alone = tiles.tiles <= ALONE and rows.sizes[-1] <= tiles.cols
        grid = 1 if alone or grid == 0 else grid
        ticket = _ticket(rows.a, fill=meta["COUNT"]) if grid > 1 or not meta["COUNT"] else None
        if not meta["COUNT"]:
            n, inner, *_, l_outer, l_inner, m_outer, m_inner, _ = rows.sizes
            launch(
                pair_count_kernel, (1,), rows.a.device,
                rows.labels, rows.mask, num_items, found[0], ticket, n, inner, l_outer, l_inner, m_outer, m_inner,
                options.ignore_index, num_warps=8,
            )  # fmt: skip
    launch(
        pair_rows_kernel, (grid,), rows.a.device,
        *rows, num_items, *found, *into, *(out or (None,) * 4), ticket, *rows.sizes, *options[1:3], options.weight,
        tiles.tiles, FINISH=out is not None, SMOOTH=options.smoothing > 0, ROWS=tiles.rows, COLS=tiles.cols,
        num_warps=tiles.num_warps, **meta, **options.meta,
    )  # fmt: skip


def _rewrite(rows: Rows, logits, grad, stats, scales, to, options: Options, expected):
    """to: where the gradients go, maybe the logits; with `expected` they are right where grad is that."""
    into = [_over(x, at, g) for x, at, g in zip((rows.a, rows.b), logits, to)]
    inplace = any(g is rows.a or g is rows.b for g in into)
    _gradient(rows, grad, stats, scales, *into, options, CORRECT=expected is not None, INPLACE=inplace)
    for gradient, written in zip(to, into):
        _put_back(gradient, written)


def _gradient(rows: Rows, grad, stats, scales, da, db, options: Options, CORRECT=False, INPLACE=False, HELD=False):
    *sizes, classes = rows.sizes
    tiles = make_tiles(rows.count, classes)
    grad = as_pairs(grad)
    # A scalar is every row's.
    strides = two_strides(grad if grad is not None and grad.numel() > 1 else None)
    col_tiles = -(-classes // tiles.cols)
    launch(
        pair_grad_kernel, (min(tiles.tiles * col_tiles, GRID),), rows.a.device,
        grad, *rows, stats, scales, da, db, *sizes, *strides, classes, *options[1:3], options.weight,
        tiles.tiles, col_tiles, CORRECT=CORRECT, INPLACE=INPLACE, HELD=HELD, ROWS=tiles.rows, COLS=tiles.cols,
        num_warps=tiles.num_warps, **options.meta,
    )  # fmt: skip


def _over(rows: torch.Tensor, logits: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Where the gradient is written: `rows`, the logits as the kernels find them, where it takes their place."""
    return rows if gradient is not None and gradient.data_ptr() == logits.data_ptr() else gradient


def _put_back(gradient: torch.Tensor | None, written: torch.Tensor | None) -> None:
    """Where strides made `written` a copy, the gradient gets its values."""
    if gradient is not None and gradient.data_ptr() != written.data_ptr():
        gradient.copy_(written.view(gradient.shape))


def _ticket(like: torch.Tensor, fill: bool = True) -> torch.Tensor:
    return (torch.zeros if fill else torch.empty)(1, dtype=torch.int32, device=like.device)


def _wide(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
