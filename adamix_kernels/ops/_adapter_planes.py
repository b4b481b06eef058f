"""Planes of an adapter's weight gradients, one for a split of the tokens: how many, and the kernel that sums them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .._triton_utils import launch, narrow

# Programs that fill a GPU (three on each of 132 multiprocessors, and somewhat more) and that are few, tiles that make a
# split worth its plane, and most planes.
PROGRAMS, FEW_PROGRAMS, MIN_TILES, MAX_SPLITS = 1024, 64, 4, 64
SUM_CHUNK, SUM_COLS = 8, 256
# Of more planes than MAX_SPLITS: as many at once as keep their sum short.
MANY_CHUNK, MANY_COLS = 32, 128


def count_splits(rows: int, blocks: int, tile: int, columns: int, row_bytes: int, share: int = 4) -> int:
    """How many parts all tokens are split into, from sizes and the tile alone; those of one of M experts have 1/M.

    The tile is that of the GPU's architecture: there the same inputs give the same bits, on another one perhaps not.

    Enough programs, each with enough tiles, and float32 planes [splits, columns] that hold at most a quarter of the
    bytes they sum, or 1/share of them from FEW_PROGRAMS programs on: `row_bytes` a row, both for one feature of every
    side that is wanted.
    """
    cheap, affordable = (rows * row_bytes // max(1, 4 * part * columns) for part in (share, 4))
    affordable = max(cheap, min(affordable, FEW_PROGRAMS // blocks))
    return max(1, min(PROGRAMS // blocks, -(-rows // (tile * MIN_TILES)), affordable, MAX_SPLITS))


@triton.jit
def _sum_planes(planes, out, splits, block, SIZE: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr):
    at = block.to(tl.int64) * COLS + tl.arange(0, COLS)
    acc = tl.zeros([COLS], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        mask = (split < splits)[:, None] & (at < SIZE)[None, :]
        acc += tl.sum(tl.load(planes + split.to(tl.int64)[:, None] * SIZE + at[None, :], mask=mask, other=0.0), axis=0)
    tl.store(out + at, narrow(acc, out.dtype.element_ty), mask=at < SIZE)


@triton.jit(do_not_specialize=["down_splits", "up_splits"])
def adapter_plane_sum_kernel(
    down_plane, down_bias_plane, up_plane, up_bias_plane, down_grad, down_bias_grad, up_grad, up_bias_grad,
    down_splits, up_splits,
    DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr, UP: tl.constexpr, UP_BIAS: tl.constexpr,
    CHUNK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """grad = sum of its planes over the splits, in a fixed order, rounded once; sizes in elements, 0: absent."""
    block = tl.program_id(0)
    a: tl.constexpr = (DOWN + COLS - 1) // COLS
    b: tl.constexpr = a + (DOWN_BIAS + COLS - 1) // COLS
    c: tl.constexpr = b + (UP + COLS - 1) // COLS
    if DOWN > 0:  # noqa: SIM102
        if block < a:
            _sum_planes(down_plane, down_grad, down_splits, block, DOWN, CHUNK, COLS)
    # Of a side of no features the bias alone is there.
    if DOWN_BIAS > 0:  # noqa: SIM102
        if block >= a and block < b:
            _sum_planes(down_bias_plane, down_bias_grad, down_splits, block - a, DOWN_BIAS, CHUNK, COLS)
    if UP > 0:  # noqa: SIM102
        if block >= b and block < c:
            _sum_planes(up_plane, up_grad, up_splits, block - b, UP, CHUNK, COLS)
    if UP_BIAS > 0:  # noqa: SIM102
        if block >= c:
            _sum_planes(up_bias_plane, up_bias_grad, up_splits, block - c, UP_BIAS, CHUNK, COLS)


def sum_planes(
    x: torch.Tensor, planes: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], down_splits: int, up_splits: int
) -> None:
    """Fills both banks' and biases' gradients from their planes; what one split has written is the gradient."""
    sizes = [0 if plane is out else out.numel() for plane, out in zip(planes, outputs)]
    if any(sizes):
        many = max(down_splits, up_splits) > MAX_SPLITS
        chunk, cols = (MANY_CHUNK, MANY_COLS) if many else (SUM_CHUNK, SUM_COLS)
        launch(
            adapter_plane_sum_kernel, (sum(-(-n // cols) for n in sizes),), x.device,
            *planes, *outputs, down_splits, up_splits,
            DOWN=sizes[0], DOWN_BIAS=sizes[1], UP=sizes[2], UP_BIAS=sizes[3], CHUNK=chunk, COLS=cols,
        )  # fmt: skip
