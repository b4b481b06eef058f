"""Device functions of a tile of tokens and its experts' narrow columns, for the routed ops' Triton kernels.

The r columns of the experts a tile may need lie side by side in one narrow tile of MP * RP columns:
column m * RP + k is feature k of expert m. MP is 1 where the tile has one expert (RP is then at least
16, what tl.dot wants), the padded number of experts where its rows differ (MASKED).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_rows(span, perm, tile_start, tile_stop, ROWS: tl.constexpr):
    """Rows of this program's tile [ROWS], which of them exist, and the first.

    Tiles do not cross a span (a sample's tokens, or all of them); with perm, tile t holds up to
    ROWS rows of perm from tile_start[t] on, before its group's end tile_stop[t].
    """
    tile = tl.program_id(0)
    if perm is not None:
        start = tl.load(tile_start + tile)
        stop = tl.load(tile_stop + tile)
        at = start + tl.arange(0, ROWS)
        valid = at < stop
        rows = tl.load(perm + at, mask=valid, other=0).to(tl.int32)
        first = tl.load(perm + start, mask=start < stop, other=0).to(tl.int32)
    else:
        tiles = tl.cdiv(span, ROWS)
        offset = (tile % tiles) * ROWS
        first = (tile // tiles) * span + offset
        valid = offset + tl.arange(0, ROWS) < span
        rows = first + tl.arange(0, ROWS)
    return rows, valid, first


@triton.jit
def tile_experts(index, div, rows, valid, first, perm, M: tl.constexpr, MASKED: tl.constexpr):
    """(expert ids, [ROWS] rows whose id is outside the bank); row n is routed by index[n // div].

    The ids are [ROWS] where MASKED, else the tile's one as a 64-bit scalar; of a bank of M, whatever the index holds.
    """
    if index is None:
        return (first * 0).to(tl.int64), rows < 0
    elif M == 1:
        return (first * 0).to(tl.int64), tl.load(index + rows // div, mask=valid, other=0) != 0
    elif MASKED:
        ids = tl.load(index + rows // div, mask=valid, other=0).to(tl.int64)
        return tl.minimum(tl.maximum(ids, 0), M - 1), (ids < 0) | (ids >= M)
    else:
        own = tl.load(index + first // div).to(tl.int64)
        if perm is not None:
            ids = tl.load(index + rows // div, mask=valid, other=0).to(tl.int64)
            wrong = (ids < 0) | (ids >= M)
        else:
            wrong = (rows < 0) | (own < 0) | (own >= M)
        return tl.minimum(tl.maximum(own, 0), M - 1), wrong


@triton.jit
def poison(values, wrong):
    """NaN in the rows [ROWS, :] that a wrong id routes."""
    return tl.where(wrong[:, None], float("nan"), values)


@triton.jit
def bank_columns(bank, expert, SIZE, STRIDE, R, RP: tl.constexpr, M, MP: tl.constexpr, MASKED: tl.constexpr):
    """Pointers [MP * RP] to the first feature of every narrow column, and which columns exist."""
    column = tl.arange(0, MP * RP)
    m = column // RP
    k = column % RP
    if MASKED:
        return bank + m.to(tl.int64) * SIZE + k * STRIDE, (m < M) & (k < R)
    else:
        return bank + expert * SIZE + k * STRIDE, (m == 0) & (k < R)


@triton.jit
def keep_own(wide, expert, RP: tl.constexpr, MP: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, MP * RP] -> [ROWS, RP]: every row keeps the columns of its own expert."""
    if MP == 1:
        return wide
    else:
        if MASKED:
            m = tl.arange(0, MP * RP) // RP
            wide = tl.where(m[None, :] == expert[:, None], wide, 0.0)
        return tl.sum(tl.reshape(wide, [ROWS, MP, RP]), axis=1)


@triton.jit
def spread(narrow, expert, RP: tl.constexpr, MP: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, RP] -> [ROWS, MP * RP]: every row's values in the columns of its own expert, zero elsewhere."""
    if MP == 1:
        return narrow
    else:
        wide = tl.reshape(tl.broadcast_to(narrow[:, None, :], [ROWS, MP, RP]), [ROWS, MP * RP])
        m = (tl.arange(0, MP * RP) // RP)[None, :]
        if MASKED:
            return tl.where(m == expert[:, None], wide, 0.0)
        else:
            return tl.where(m == 0, wide, 0.0)


@triton.jit
def shrink(
    z, rows, valid, columns, live, STRIDE,
    C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """z [ROWS, C] times the bank's columns [C, WIDTH], in float32; one pass over the rows of z."""
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    rows = rows.to(tl.int64) * C
    for start in range(0, C, COLS):
        c = start + tl.arange(0, COLS)
        z_mask = valid[:, None]
        w_mask = live[None, :]
        if C % COLS != 0:
            z_mask = z_mask & (c < C)[None, :]
            w_mask = w_mask & (c < C)[:, None]
        z_tile = tl.load(z + rows[:, None] + c[None, :], mask=z_mask, other=0.0).to(DOT)
        w_tile = tl.load(columns[None, :] + c[:, None] * STRIDE, mask=w_mask, other=0.0).to(DOT)
        acc = tl.dot(z_tile, w_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def bias_at(bias, expert, c, inside, valid, WIDTH, MASKED: tl.constexpr):
    """bias[expert, c] in float32: [1, len(c)], or [ROWS, len(c)] where rows differ."""
    if MASKED:
        return tl.load(
            bias + expert[:, None] * WIDTH + c[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
    else:
        return tl.load(bias + expert * WIDTH + c, mask=inside, other=0.0).to(tl.float32)[None, :]
