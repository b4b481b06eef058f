"""Triton backend of the consistency losses.

Launches: forward one where few rows of few classes are one program's, else two, of which the first numbers the rows;
the gradient comes with it where one is wanted. Backward one, whose programs return at once where the forward's
gradient is right already. The logits are read once, for the gradient of many classes once more (16-bit rows but for
what registers hold; from L2 where the rows fit), and their gradient is written once. linear_adamix_loss: one launch a
chunk, which reads the chunk's logits and writes their gradient over them.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from ...._triton_utils import launch, memory
from ...._triton_utils import problem as unsupported
from ..._triton_plans import Planned
from .._chunks import Chunk, linear_loss
from ..signatures import Linear
from .backward import pair_grad_kernel, rescale_kernel
from .finish import pair_count_kernel
from .forward import pair_rows_kernel
from .plan import (
    FEW,
    GRID,
    MAX_REGISTERS,
    Rows,
    as_pairs,
    as_rows,
    in_step,
    kept_steps,
    make_rows,
    make_tiles,
    make_wide,
    phase,
    stages,
    two_strides,
    wide_programs,
)
from .wide import pair_wide_grad_kernel, pair_wide_kernel

__all__ = [
    "adamix_backward", "adamix_forward", "adamix_forward_grad", "backward", "direct", "forward", "forward_grad",
    "linear_forward", "rescale", "unsupported", "writes_gradient",
]  # fmt: skip


class Options(NamedTuple):
    """What every launch takes beside tensors."""

    weight: float
    ignore_index: int
    smoothing: float
    detach_target: bool

    @property
    def meta(self) -> dict[str, bool]:
        return dict(FULL=not self.detach_target, SMOOTH=self.smoothing > 0)


def writes_gradient(device_type, dtype, expected):
    """float16 trains under a loss scale, which the forward must know."""
    return dtype != torch.float16 or expected is not None


def forward(logits_a, logits_b, mask, detach_target, reduction):
    return _consistency(logits_a, logits_b, mask, detach_target, reduction, 1.0, None, None)


def forward_grad(logits_a, logits_b, mask, detach_target, reduction, expected, da, db):
    return _consistency(logits_a, logits_b, mask, detach_target, reduction, expected, da, db)


def backward(grad, logits_a, logits_b, mask, stats, scale, detach_target, out=None, expected=None):
    rows = make_rows(logits_a, logits_b, None, mask)
    if out is None:
        out = logits_a.new_empty(logits_a.shape), logits_b.new_empty(logits_b.shape)
    options = Options(1.0, 0, 0.0, detach_target)
    _gradient(rows, (logits_a, logits_b), grad, stats, scale, out, options, expected)
    return out


def adamix_forward(logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target):
    options = Options(weight, ignore_index, label_smoothing, detach_target)
    return _adamix(logits, labels, mask, num_items, options, 1.0, None)


def adamix_forward_grad(
    logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target, expected, d_logits
):  # fmt: skip
    options = Options(weight, ignore_index, label_smoothing, detach_target)
    return _adamix(logits, labels, mask, num_items, options, expected, d_logits)


def adamix_backward(
    grad, logits, labels, mask, stats, scales, weight, ignore_index, label_smoothing, detach_target, out=None,
    expected=None,
):  # fmt: skip
    out = logits.new_empty(logits.shape) if out is None else out
    (a, b), (da, db) = _passes(logits), _passes(out)
    options = Options(weight, ignore_index, label_smoothing, detach_target)
    _gradient(make_rows(a, b, labels, mask), (a, b), grad, stats, scales, (da, db), options, expected)
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
    if gradient.data_ptr() != x.data_ptr():
        gradient.copy_(x.view(gradient.shape))


def linear_forward(*arguments):
    """The reference's chunks; a chunk's logits are overwritten by their gradient."""
    return linear_loss(_chunk, Linear(*arguments))


def _chunk(arguments: Linear, logits, labels, counted, selected, factors, need_grad) -> Chunk:
    a, b = _passes(logits)
    rows = make_rows(a, b, labels, selected)
    losses = _empty(logits, 2, labels.shape[0])
    grads = (rows.a, rows.b) if need_grad else (None, None)
    options = Options(1.0, arguments.ignore_index, arguments.label_smoothing, arguments.detach_target)
    _forward(rows, None, (factors, None, losses), grads, None, options)
    return Chunk(losses[0], losses[1], logits if need_grad else None)


def _consistency(logits_a, logits_b, mask, detach_target, reduction, expected, da, db):
    rows = make_rows(logits_a, logits_b, None, mask)
    stats = _empty(logits_a, 4 if detach_target else 6, *logits_a.shape[:-1])
    losses, scale = _empty(logits_a, *logits_a.shape[:-1]), _empty(logits_a)
    options = Options(1.0, 0, 0.0, detach_target)
    if reduction == "none":
        _forward(rows, None, (scale.fill_(1.0), stats, losses), (None, None), None, options)
        return losses, stats, scale
    out = _empty(logits_a), None, None
    with _places(rows, (logits_a, logits_b), (da, db)) as into:
        _forward(rows, None, (scale, stats, losses), into, out, options, expected, reduction == "batchmean")
    return out[0], stats, scale


def _adamix(logits, labels, mask, num_items, options, expected, d_logits):
    a, b = _passes(logits)
    rows = make_rows(a, b, labels, mask)
    stats = _empty(logits, 2 if options.detach_target else 3, *logits.shape[:-1])
    scales, losses = _empty(logits, 2), _empty(logits, 2, *labels.shape)
    out = tuple(_empty(logits) for _ in range(3))
    with _places(rows, (a, b), (None, None) if d_logits is None else _passes(d_logits)) as into:
        _forward(rows, num_items, (scales, stats, losses), into, out, options, expected)
    return *out, stats, scales


def _forward(rows: Rows, num_items, found, into, out, options: Options, expected=1.0, mean=True):
    """found: (scales, statistics, row losses); into: the gradients or Nones, for an incoming one of `expected`; out:
    the scalars, or None: there are none, and the scales are given."""
    few, (n, inner, *_, l_outer, l_inner, m_outer, m_inner, _) = rows.classes <= FEW, rows.sizes
    tiles = make_tiles(n, rows.classes) if few else None
    alone = few and tiles.programs == 1
    ticket = None
    if out is not None and not alone:
        ticket = memory(rows.a, 1, dtype=torch.int32)
        launch(
            pair_count_kernel, (1,), rows.a.device,
            rows.labels, rows.mask, num_items, found[0], ticket, n, inner, l_outer, l_inner, m_outer, m_inner,
            options.ignore_index, MEAN=mean, num_warps=8,
        )  # fmt: skip
    out, finish, inplace = out or (None,) * 3, out is not None, _over(rows, into)
    if few:
        launch(
            pair_rows_kernel, (tiles.programs,), rows.a.device,
            *rows, num_items, *found, *into, *out, ticket, *rows.sizes, *options[1:3], options.weight, expected,
            tiles.tiles, FINISH=finish, COUNT=alone and finish, MEAN=mean, INPLACE=inplace, ROWS=tiles.rows,
            COLS=tiles.cols, num_warps=tiles.num_warps, maxnreg=MAX_REGISTERS, **options.meta,
        )  # fmt: skip
    else:
        keep = kept_steps(any(g is not None for g in into), not options.detach_target, options.smoothing > 0)
        grid, where, held, meta = _wide(rows, into, keep)
        launch(
            pair_wide_kernel, grid, rows.a.device,
            *rows, *found, *into, *out, ticket, *rows.sizes, where, *options[1:3], options.weight, expected,
            FINISH=finish, INPLACE=inplace, HELD=held, **meta, **options.meta,
        )  # fmt: skip


def _gradient(rows: Rows, logits, grad, stats, scales, gradients, options: Options, expected):
    """gradients: where they go, maybe the logits; with `expected` they are right already where grad is that."""
    grad = as_pairs(grad)
    # A scalar is every row's.
    strides = two_strides(grad if grad.numel() > 1 else None)
    *sizes, classes = rows.sizes
    sizes = *sizes, *strides, classes
    with _places(rows, logits, gradients) as into:
        rest = dict(CORRECT=expected is not None, INPLACE=_over(rows, into), **options.meta)
        if classes <= FEW:
            tiles = make_tiles(rows.count, classes)
            launch(
                pair_grad_kernel, (min(tiles.tiles, GRID),), rows.a.device,
                grad, *rows, stats, scales, *into, *sizes, *options[1:3], options.weight, expected or 1.0, tiles.tiles,
                ROWS=tiles.rows, COLS=tiles.cols, num_warps=tiles.num_warps, maxnreg=MAX_REGISTERS, **rest,
            )  # fmt: skip
        else:
            grid, where, _, meta = _wide(rows, into)
            launch(
                pair_wide_grad_kernel, grid, rows.a.device,
                grad, *rows, stats, scales, *into, *sizes, where, *options[1:3], options.weight, expected or 1.0,
                **meta, **rest,
            )  # fmt: skip


def _wide(rows: Rows, into, keep: int = 0) -> tuple[tuple[int], int, int, dict[str, int]]:
    """(grid, phase of a, steps held, constants) of the kernels for many classes; into: the gradients or Nones."""
    size = rows.a.element_size()
    aligned = in_step(rows.a, rows.b, 16 // size)
    wide = make_wide(rows.classes, size, aligned, keep)
    stores = aligned and all(in_step(rows.a, as_rows(g), wide.vector) for g in into if g is not None)
    meta = dict(
        ALIGNED=aligned, STORES=stores, COLS=wide.cols, VECTOR=wide.vector, REST=wide.rest,
        STAGES=stages(aligned, stores), num_warps=wide.num_warps, maxnreg=wide.registers,
    )  # fmt: skip
    return (wide_programs(rows.count, wide, rows.a.device),), phase(rows.a, wide.vector), wide.held, meta


@contextlib.contextmanager
def _places(rows: Rows, logits, gradients):
    """Where kernels write what becomes `gradients` (None: not wanted): `rows`, the logits as they find them, where a
    gradient takes their place."""
    into = tuple(
        x if g is not None and g.data_ptr() == at.data_ptr() else g
        for x, at, g in zip((rows.a, rows.b), logits, gradients, strict=True)
    )
    yield into
    for gradient, written in zip(gradients, into, strict=True):
        # Strides made a copy of the logits.
        if gradient is not None and gradient.data_ptr() != written.data_ptr():
            gradient.copy_(written.view(gradient.shape))


def _over(rows: Rows, into) -> bool:
    return any(g is rows.a or g is rows.b for g in into)


def _passes(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = logits.shape[0] // 2
    return logits[:half], logits[half:]


def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return memory(like, *shape, dtype=torch.float32)


class _Direct:
    """Calls past the dispatcher and Triton's JIT."""

    writes_gradient = staticmethod(writes_gradient)

    def __init__(self) -> None:
        self.adamix, self.consistency = Planned(_plan_adamix, 4, True), Planned(_plan_consistency, 3, True)
        self.adamix_backward = Planned(_plan_adamix_grad, 7, True)
        self.consistency_backward = Planned(_plan_pair_grad, 8, True)


def _plan_adamix(logits, labels, mask, num_items, write, *options):
    out = memory(logits, *logits.shape) if write else None
    made = _adamix(logits, labels, mask, num_items, Options(*options[:4]), options[4], out)
    return made if out is None else (*made, out)


def _plan_consistency(logits_a, logits_b, mask, write_a, write_b, *options):
    places = (memory(t, *t.shape) if write else None for t, write in ((logits_a, write_a), (logits_b, write_b)))
    da, db = places
    return *_consistency(logits_a, logits_b, mask, *options, da, db), *(g for g in (da, db) if g is not None)


def _plan_adamix_grad(grad, logits, labels, mask, stats, scales, out, *options):
    adamix_backward(grad, logits, labels, mask, stats, scales, *options[:4], out, options[4])
    return ()


def _plan_pair_grad(grad, logits_a, logits_b, mask, stats, scale, da, db, detach_target, expected):
    backward(grad, logits_a, logits_b, mask, stats, scale, detach_target, (da, db), expected)
    return ()


direct = _Direct()
