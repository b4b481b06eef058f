"""Triton backend of the consistency losses.

Launches: forward one where few rows of few classes are one program's, else two, of which the first numbers the rows;
the gradient comes with it where one is wanted. Backward one, whose programs return at once where the forward's gradient
is right already. The logits are read once, for the gradient of many classes once more (from L2 where the rows fit), and
their gradient is written once. linear_adamix_loss: one launch a chunk, which reads the chunk's logits and writes their
gradient over them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...._triton_utils import launch
from ...._triton_utils import problem as unsupported
from .._chunks import Chunk, linear_loss
from .backward import pair_grad_kernel, rescale_kernel
from .finish import pair_count_kernel
from .forward import pair_rows_kernel
from .plan import (
    FEW,
    GRID,
    MAX_REGISTERS,
    STAGES,
    WIDE_REGISTERS,
    Rows,
    as_pairs,
    as_rows,
    in_step,
    make_rows,
    make_tiles,
    make_wide,
    phase,
    two_strides,
    wide_programs,
)
from .wide import pair_wide_grad_kernel, pair_wide_kernel

__all__ = [
    "GRADIENT_DTYPES", "adamix_backward", "adamix_forward", "adamix_forward_grad", "backward", "forward",
    "forward_grad", "linear_forward", "rescale", "unsupported",
]  # fmt: skip

# float16 trains under a loss scale, for which a gradient written by the forward would be written again.
GRADIENT_DTYPES = (torch.bfloat16, torch.float32)


class Options(NamedTuple):
    """What every launch takes beside tensors."""

    weight: float
    ignore_index: int
    smoothing: float
    detach_target: bool

    @property
    def meta(self) -> dict[str, bool]:
        return dict(FULL=not self.detach_target, SMOOTH=self.smoothing > 0)


def forward(logits_a, logits_b, mask, detach_target, reduction):
    return _consistency(logits_a, logits_b, mask, detach_target, reduction, None, None)[:3]


def forward_grad(logits_a, logits_b, mask, detach_target, reduction, da, db):
    return _consistency(logits_a, logits_b, mask, detach_target, reduction, da, db)


def backward(grad, logits_a, logits_b, mask, stats, scale, detach_target, out=None):
    rows, correct = make_rows(logits_a, logits_b, None, mask), out is not None
    if out is None:
        out = logits_a.new_empty(logits_a.shape), logits_b.new_empty(logits_b.shape)
    _gradient(rows, grad, stats, scale, *out, Options(1.0, 0, 0.0, detach_target), CORRECT=correct)
    return out


def adamix_forward(logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target):
    options = Options(weight, ignore_index, label_smoothing, detach_target)
    return _adamix(logits, labels, mask, num_items, options, None)[:5]


def adamix_forward_grad(
    logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target, d_logits
):  # fmt: skip
    return _adamix(
        logits, labels, mask, num_items, Options(weight, ignore_index, label_smoothing, detach_target), d_logits
    )


def adamix_backward(
    grad, logits, labels, mask, stats, scales, weight, ignore_index, label_smoothing, detach_target, out=None
):  # fmt: skip
    half, correct = labels.shape[0], out is not None
    rows = make_rows(logits[:half], logits[half:], labels, mask)
    out = logits.new_empty(logits.shape) if out is None else out
    options = Options(weight, ignore_index, label_smoothing, detach_target)
    _gradient(rows, grad, stats, scales, out[:half], out[half:], options, CORRECT=correct)
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
        losses = _empty(logits, 2, half)
        grads = (logits[:half], logits[half:]) if need_grad else (None, None)
        options = Options(1.0, ignore_index, label_smoothing, detach_target)
        _forward(rows, None, (factors, None, losses), grads, None, options)
        return Chunk(losses[0].sum(), losses[1].sum(), logits if need_grad else None)

    return linear_loss(
        chunk, hidden, lm_head_weight, bias, labels, mask, num_items, weight, ignore_index,
        chunk_rows, need_hidden, need_weight, need_bias,
    )  # fmt: skip


def _consistency(logits_a, logits_b, mask, detach_target, reduction, da, db):
    rows = make_rows(logits_a, logits_b, None, mask)
    stats = _empty(logits_a, 4 if detach_target else 6, *logits_a.shape[:-1])
    losses, scale = _empty(logits_a, *logits_a.shape[:-1]), _empty(logits_a)
    options, factor = Options(1.0, 0, 0.0, detach_target), None
    if reduction == "none":
        _forward(rows, None, (scale.fill_(1.0), stats, losses), (None, None), None, options)
        return losses, stats, scale, factor
    loss, factor = _empty(logits_a), _empty(logits_a)
    into = (_over(rows.a, logits_a, da), _over(rows.b, logits_b, db))
    out = loss, None, None, factor
    _forward(rows, None, (scale, stats, losses), into, out, options, mean=reduction == "batchmean")
    _put_back(da, into[0])
    _put_back(db, into[1])
    return loss, stats, scale, factor


def _adamix(logits, labels, mask, num_items, options, d_logits):
    half = labels.shape[0]
    rows = make_rows(logits[:half], logits[half:], labels, mask)
    stats = _empty(logits, 2 if options.detach_target else 3, *logits.shape[:-1])
    loss, cross_entropy, consistency, factor = (_empty(logits) for _ in range(4))
    scales, losses, into = _empty(logits, 2), _empty(logits, 2, *labels.shape), (None, None)
    if d_logits is not None:
        da, db = d_logits[:half], d_logits[half:]
        into = _over(rows.a, logits[:half], da), _over(rows.b, logits[half:], db)
    out = loss, cross_entropy, consistency, factor
    _forward(rows, num_items, (scales, stats, losses), into, out, options)
    if d_logits is not None:
        _put_back(da, into[0])
        _put_back(db, into[1])
    return loss, cross_entropy, consistency, stats, scales, factor


def _forward(rows: Rows, num_items, found, into, out, options: Options, mean=True):
    """found: (scales, statistics, row losses); into: the gradients or Nones; out: the scalars, or None: there are none,
    and the scales are given."""
    few, (n, inner, *_, l_outer, l_inner, m_outer, m_inner, _) = rows.classes <= FEW, rows.sizes
    tiles = make_tiles(n, rows.classes) if few else None
    alone = few and tiles.programs == 1
    ticket = None
    if out is not None and not alone:
        ticket = torch.empty(1, dtype=torch.int32, device=rows.a.device)
        launch(
            pair_count_kernel, (1,), rows.a.device,
            rows.labels, rows.mask, num_items, found[0], ticket, n, inner, l_outer, l_inner, m_outer, m_inner,
            options.ignore_index, MEAN=mean, num_warps=8,
        )  # fmt: skip
    out, finish = out or (None,) * 4, out is not None
    inplace = any(g is rows.a or g is rows.b for g in into)
    if few:
        launch(
            pair_rows_kernel, (tiles.programs,), rows.a.device,
            *rows, num_items, *found, *into, *out, ticket, *rows.sizes, *options[1:3], options.weight, tiles.tiles,
            FINISH=finish, COUNT=alone and finish, MEAN=mean, INPLACE=inplace, ROWS=tiles.rows, COLS=tiles.cols,
            num_warps=tiles.num_warps, maxnreg=MAX_REGISTERS, **options.meta,
        )  # fmt: skip
        return
    grid, where, meta = _wide(rows, (rows.a, rows.b) if inplace else into)
    launch(
        pair_wide_kernel, grid, rows.a.device,
        *rows, *found, *into, *out, ticket, *rows.sizes, where, *options[1:3], options.weight,
        FINISH=finish, INPLACE=inplace, **meta, **options.meta,
    )  # fmt: skip


def _gradient(rows: Rows, grad, stats, scales, da, db, options: Options, CORRECT):
    grad = as_pairs(grad)
    # A scalar is every row's.
    strides = two_strides(grad if grad.numel() > 1 else None)
    *sizes, classes = rows.sizes
    sizes = *sizes, *strides, classes
    if classes <= FEW:
        tiles = make_tiles(rows.count, classes)
        launch(
            pair_grad_kernel, (min(tiles.tiles, GRID),), rows.a.device,
            grad, *rows, stats, scales, da, db, *sizes, *options[1:3], options.weight, tiles.tiles,
            CORRECT=CORRECT, ROWS=tiles.rows, COLS=tiles.cols, num_warps=tiles.num_warps, maxnreg=MAX_REGISTERS,
            **options.meta,
        )  # fmt: skip
        return
    grid, where, meta = _wide(rows, (da, db))
    launch(
        pair_wide_grad_kernel, grid, rows.a.device,
        grad, *rows, stats, scales, da, db, *sizes, where, *options[1:3], options.weight,
        CORRECT=CORRECT, **meta, **options.meta,
    )  # fmt: skip


def _wide(rows: Rows, into) -> tuple[tuple[int], int, dict[str, int]]:
    """(grid, phase of a, constants) of the kernels for many classes; into: the gradients or Nones."""
    wide = make_wide(rows.classes, rows.a.element_size())
    aligned = in_step(rows.a, rows.b, wide.vector)
    stores = aligned and all(in_step(rows.a, as_rows(g), wide.vector) for g in into if g is not None)
    meta = dict(
        ALIGNED=aligned, STORES=stores, COLS=wide.cols, VECTOR=wide.vector, STAGES=STAGES, num_warps=wide.num_warps,
        maxnreg=WIDE_REGISTERS,
    )  # fmt: skip
    return (wide_programs(rows.count, wide, rows.a.device),), phase(rows.a, wide.vector), meta


def _over(rows: torch.Tensor, logits: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Where the gradient is written: `rows`, the logits as the kernels find them, where it takes their place."""
    return rows if gradient is not None and gradient.data_ptr() == logits.data_ptr() else gradient


def _put_back(gradient: torch.Tensor | None, written: torch.Tensor | None) -> None:
    """Where strides made `written` a copy, the gradient gets its values."""
    if gradient is not None and gradient.data_ptr() != written.data_ptr():
        gradient.copy_(written.view(gradient.shape))


def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
