"""Second launch of the backward: gradients of both banks and both biases by split, and of gates by sample.

The columns of all experts are one narrow tile, so every row of x and dy is read once for each block of features,
whatever its experts; each (split, block of features) writes its own float32 plane, and the planes are summed in a fixed
order. No atomics: the same bits every time. Traffic: x and dy once, dpre and h, both [N, experts * r], once for every
block of features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow
from ..._gated_sum import sum_sample
from ..._gated_tiles import expert_of


@triton.jit
def _accumulate(
    acc, sums, g, z, weights, index, div, rows, valid, c, only,
    C: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, M: tl.constexpr, SIDE: tl.constexpr,
    ONLY: tl.constexpr, PART: tl.constexpr, GP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Over the tile's rows: acc [COLS, WIDTH] += z^T g; for PART "up" also sums [COLS, GP] += z^T weights, for "bias"
    sums [WIDTH] += g's alone. ONLY: of rows and columns that name expert `only`.
    """
    k = tl.arange(0, WIDTH)
    e = tl.arange(0, GP)
    mine = k < M * R
    if ONLY:
        mine = mine & (k // R == only)
        named = rows < 0
        for slot in tl.static_range(K):
            expert, wrong = expert_of(index, div, rows, valid, slot, K, M)
            named = named | ((expert == only) & ~wrong)
        valid = valid & named
    row = rows.to(tl.int64)[:, None]
    g_tile = tl.load(g + row * (M * R) + k[None, :], mask=valid[:, None] & mine[None, :], other=0.0)
    if PART == "bias":
        sums += tl.sum(g_tile.to(tl.float32), axis=0)
    else:
        z_mask = valid[:, None]
        if C == 0 or C % COLS != 0:
            z_mask = z_mask & (c < C)[None, :]
        z_tile = tl.load(z + row * C + c[None, :], mask=z_mask, other=0.0).to(DOT)
        acc = tl.dot(tl.trans(z_tile), g_tile.to(DOT), acc, input_precision=PRECISION)
        if PART == "up":
            w_tile = tl.load(weights + row * GP + e[None, :], mask=valid[:, None], other=0.0).to(DOT)
            sums = tl.dot(tl.trans(z_tile), w_tile, sums, input_precision=PRECISION)
    return acc, sums


@triton.jit
def _plane(
    g, z, weights, index, plane, bias_plane, num_rows, div, split, splits, block,
    C: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, M: tl.constexpr, SIDE: tl.constexpr,
    PART: tl.constexpr, GP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """All experts' gradient from one split of the rows, features block * COLS : + COLS, or the biases' alone."""
    c = block * COLS + tl.arange(0, COLS)
    k = tl.arange(0, WIDTH)
    e = tl.arange(0, GP)
    acc = tl.zeros([COLS, WIDTH], tl.float32)
    if PART == "bias":
        sums = tl.zeros([WIDTH], tl.float32)
    else:
        sums = tl.zeros([COLS, GP], tl.float32)
    tiles = tl.cdiv(num_rows, ROWS)
    share = tl.cdiv(tiles, splits)
    begin = split * share
    end = tl.minimum(begin + share, tiles)
    for tile in range(begin, end):
        rows = tile * ROWS + tl.arange(0, ROWS)
        acc, sums = _accumulate(
            acc, sums, g, z, weights, index, div, rows, rows < num_rows, c, 0,
            C, R, WIDTH, K, M, SIDE, False, PART, GP, DOT, PRECISION, COLS,
        )  # fmt: skip
    _store(acc, sums, plane, bias_plane, split, c, k < M * R, e < M, C, R, M, PART, WIDTH, GP)
    if SIDE == "chosen" and PART != "bias":
        wrong = tl.max(tl.reshape(tl.where(acc == acc, 0, 1), [COLS * WIDTH], can_reorder=True), 0)
        if PART == "up":
            wrong |= tl.max(tl.reshape(tl.where(sums == sums, 0, 1), [COLS * GP], can_reorder=True), 0)
        if wrong > 0:
            # Perhaps an infinity of a row that does not name the expert, as 0 * inf: each expert by its own rows.
            for own in range(M):
                acc, sums = tl.zeros([COLS, WIDTH], tl.float32), tl.zeros([COLS, GP], tl.float32)
                for tile in range(begin, end):
                    rows = tile * ROWS + tl.arange(0, ROWS)
                    acc, sums = _accumulate(
                        acc, sums, g, z, weights, index, div, rows, rows < num_rows, c, own,
                        C, R, WIDTH, K, M, SIDE, True, PART, GP, DOT, PRECISION, COLS,
                    )  # fmt: skip
                _store(acc, sums, plane, bias_plane, split, c, k // R == own, e == own, C, R, M, PART, WIDTH, GP)


@triton.jit
def _store(
    acc, sums, plane, bias_plane, split, c, columns, experts,
    C: tl.constexpr, R: tl.constexpr, M: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """A split's planes, those columns and experts of them."""
    k = tl.arange(0, WIDTH)
    e = tl.arange(0, GP)
    split = split.to(tl.int64)
    if PART == "bias":
        tl.store(bias_plane + split * (M * R) + k, narrow(sums, bias_plane.dtype.element_ty), mask=columns)
    else:
        to = plane + split * (M * R * C)
        inside = (c < C)[:, None]
        if PART == "up":
            to += (k // R * (C * R) + k % R)[None, :] + c[:, None] * R
            at = bias_plane + split * (M * C) + e[None, :] * C + c[:, None]
            tl.store(at, narrow(sums, bias_plane.dtype.element_ty), mask=inside & experts[None, :])
        else:
            to += c[:, None] + k[None, :] * C
        tl.store(to, narrow(acc, plane.dtype.element_ty), mask=inside & columns[None, :])


@triton.jit(do_not_specialize=["num_rows", "div", "down_splits", "up_splits"])
def gated_adapter_weight_grad_kernel(
    x, dpre, grad_out, h, weights, down_index, up_index, row_grads,
    down_plane, down_bias_plane, up_plane, up_bias_plane, dgates, num_rows, div, down_splits, up_splits,
    H: tl.constexpr, O: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,  # noqa: E741
    MD: tl.constexpr, DOWN: tl.constexpr, DOWN_WIDTH: tl.constexpr,
    MU: tl.constexpr, UP: tl.constexpr, UP_WIDTH: tl.constexpr, GP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Planes of dWd = dpre^T x, dbd = sum dpre, dWu = dy^T h and dbu = dy^T weights, every expert's; of gates by sample
    the gradient itself, the sum of row_grads [., K].

    dpre, h and weights are those of the input gradient's kernel.
    """
    program = tl.program_id(0)
    # Of the down side one program more, for the bias.
    down_blocks: tl.constexpr = (H + COLS - 1) // COLS + 1
    up_blocks: tl.constexpr = (O + COLS - 1) // COLS if O > 0 else 1
    down_programs, up_programs = 0, 0
    if down_plane is not None:
        down_programs = down_blocks * down_splits
        if program < down_programs:
            split, block = program // down_blocks, program % down_blocks
            if block < down_blocks - 1:
                _plane(
                    dpre, x, None, down_index, down_plane, down_bias_plane, num_rows, div, split, down_splits, block,
                    H, R, DOWN_WIDTH, K, MD, DOWN, "down", 16, DOT, PRECISION, ROWS, COLS,
                )  # fmt: skip
            else:
                _plane(
                    dpre, x, None, down_index, down_plane, down_bias_plane, num_rows, div, split, down_splits, 0,
                    H, R, DOWN_WIDTH, K, MD, DOWN, "bias", 16, DOT, PRECISION, ROWS, COLS,
                )  # fmt: skip
    if up_plane is not None:
        up_programs = up_blocks * up_splits
        if program >= down_programs and program < down_programs + up_programs:
            own = program - down_programs
            _plane(
                h, grad_out, weights, up_index, up_plane, up_bias_plane, num_rows, div,
                own // up_blocks, up_splits, own % up_blocks,
                O, R, UP_WIDTH, K, MU, UP, "up", GP, DOT, PRECISION, ROWS, COLS,
            )  # fmt: skip
    if row_grads is not None:  # noqa: SIM102
        if program >= down_programs + up_programs:
            sum_sample(row_grads, dgates, program - down_programs - up_programs, div, K, KP, CHUNK)
