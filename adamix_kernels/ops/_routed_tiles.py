"""Device functions of a tile of tokens and its experts' narrow columns, for the routed ops' Triton kernels.

The r columns of the experts a tile may need lie side by side in one narrow tile of MP * RP columns:
column m * RP + k is feature k of expert m. MP is 1 where the tile has one expert (RP is then at least
16, what tl.dot wants), the padded number of experts where its rows differ (MASKED).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_utils import narrow


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
def spread(own, expert, RP: tl.constexpr, MP: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, RP] -> [ROWS, MP * RP]: every row's values in the columns of its own expert, zero elsewhere."""
    if MP == 1:
        return own
    else:
        wide = tl.reshape(tl.broadcast_to(own[:, None, :], [ROWS, MP, RP]), [ROWS, MP * RP])
        m = (tl.arange(0, MP * RP) // RP)[None, :]
        if MASKED:
            return tl.where(m == expert[:, None], wide, 0.0)
        else:
            return tl.where(m == 0, wide, 0.0)


@triton.jit
def sum_of_warps(parts, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[PARTS, ROWS, WIDTH] -> [ROWS, WIDTH], by pairs: tl.sum over warps meets a bank of shared memory 16 times."""
    parts = tl.permute(parts, (1, 2, 0))
    left: tl.constexpr = PARTS // 2
    low, high = tl.split(tl.reshape(parts, [ROWS, WIDTH, left, 2]))
    if left == 1:
        return tl.reshape(low + high, [ROWS, WIDTH])
    else:
        return sum_of_warps(tl.permute(low + high, (2, 0, 1)), left, ROWS, WIDTH)


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
def all_tiles(z, rows, valid, C: tl.constexpr, COLS: tl.constexpr):
    """The rows of z [., C] as a tuple of tiles [ROWS, COLS], all asked for at once; COLS divides C."""
    rows = rows.to(tl.int64)[:, None] * C
    tiles = ()
    for start in tl.static_range(0, C, COLS):
        c = start + tl.arange(0, COLS)
        tiles = tiles + (tl.load(z + rows + c[None, :], mask=valid[:, None], other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def shrink_tiles(
    tiles, columns, live, STRIDE,
    C: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """`shrink` of rows that are on the chip, as `all_tiles` loaded them; AHEAD: steps of the bank asked for ahead."""
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    c = tl.arange(0, COLS)[:, None]
    w_tiles = ()
    for start in tl.static_range(0, C + AHEAD * COLS, COLS):
        if start < C:
            w_tile = tl.load(columns[None, :] + (start + c) * STRIDE, mask=live[None, :], other=0.0)
            w_tiles = w_tiles + (w_tile,)  # noqa: RUF005
        if start >= AHEAD * COLS:
            acc = tl.dot(tiles[start // COLS - AHEAD].to(DOT), w_tiles[start // COLS - AHEAD].to(DOT), acc)
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


@triton.jit
def gated_bias(y, gates, bias, c, inside, C, M: tl.constexpr, GP: tl.constexpr, PRECISION: tl.constexpr):
    """y [ROWS, len(c)] + gates [ROWS, GP] times the bias bank's columns c; gates [ROWS] weigh a bank of one."""
    if len(gates.shape) == 1:
        own = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
        return tl.fma(tl.broadcast_to(gates[:, None], y.shape), tl.broadcast_to(own, y.shape), y)
    else:
        e = tl.arange(0, GP)
        b_tile = tl.load(bias + e[:, None] * C + c[None, :], mask=(e < M)[:, None] & inside[None, :], other=0.0)
        return tl.dot(gates, b_tile.to(gates.dtype), y, input_precision=PRECISION)


@triton.jit
def expand(
    t, expert, columns, live, STRIDE, bias, added, tiles, out, rows, valid,
    C: tl.constexpr, M: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, AHEAD: tl.constexpr, KEEP: tl.constexpr,
    gates=None, GP: tl.constexpr = 16,
):  # fmt: skip
    """out = t [ROWS, MP * RP] times the bank's columns [MP * RP, C] (+ bias[expert]) (+ added), stored.

    bias and added may be None. AHEAD: steps loaded ahead. KEEP: added's rows are on the chip, in `tiles`, and all rows
    have one expert, for the registers' sake. gates, unless None, weigh every expert's bias, see `gated_bias`.
    """
    offsets = rows.to(tl.int64)[:, None] * C
    if KEEP:
        tl.static_assert(not MASKED, "the second product of rows that stay is of one expert")
        w_tiles = ()
        for start in tl.static_range(0, C + AHEAD * COLS, COLS):
            if start < C:
                c = start + tl.arange(0, COLS)
                w_tile = tl.load(columns[:, None] + c[None, :] * STRIDE, mask=live[:, None], other=0.0)
                w_tiles = w_tiles + (w_tile,)  # noqa: RUF005
            if start >= AHEAD * COLS:
                c = start - AHEAD * COLS + tl.arange(0, COLS)
                if bias is not None and gates is not None:
                    y = tiles[start // COLS - AHEAD].to(tl.float32)
                    y = gated_bias(y, gates, bias, c, c < C, C, M, GP, PRECISION)
                    y = tl.dot(t, w_tiles[start // COLS - AHEAD].to(t.dtype), y)
                else:
                    y = tl.dot(t, w_tiles[start // COLS - AHEAD].to(t.dtype))
                    if bias is not None:
                        y += bias_at(bias, expert, c, c < C, valid, C, MASKED)
                    y += tiles[start // COLS - AHEAD].to(tl.float32)
                tl.store(out + offsets + c[None, :], narrow(y, out.dtype.element_ty), mask=valid[:, None])
    else:
        spoilt = _expand(
            t, expert, columns, live, STRIDE, bias, added, out, offsets, valid,
            C, RP, MP, MASKED, PRECISION, ROWS, COLS, AHEAD + 1, gates, M, GP,
        )  # fmt: skip
        if MASKED and MP > 1:  # noqa: SIM102
            if tl.max(tl.reshape(spoilt, [ROWS * COLS], can_reorder=True), 0) > 0:
                # An infinity in another expert's weights reached a row, as 0 * inf: one product for each expert,
                # 16 features a step, to keep the registers few.
                m = tl.arange(0, MP * RP) // RP
                for own in range(M):
                    _expand(
                        t, expert, columns, live & (m == own), STRIDE, bias, added, out, offsets,
                        valid & (expert == own), C, RP, MP, MASKED, PRECISION, ROWS, 16, 1,
                    )  # fmt: skip


@triton.jit
def _expand(
    t, expert, columns, live, STRIDE, bias, added, out, offsets, valid,
    C: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
    gates=None, M: tl.constexpr = 1, GP: tl.constexpr = 16,
):  # fmt: skip
    """`expand` with `added` from memory; returns where products were NaN, folded into [ROWS, COLS]."""
    spoilt = tl.zeros([ROWS, COLS], tl.int32)
    # Without its own number of stages, only what feeds a dot is loaded ahead.
    for start in tl.range(0, C, COLS, num_stages=STAGES):
        c = start + tl.arange(0, COLS)
        inside = c < C
        mask = valid[:, None]
        w_mask = live[:, None]
        if C % COLS != 0:
            mask = mask & inside[None, :]
            w_mask = w_mask & inside[None, :]
        w_tile = tl.load(columns[:, None] + c[None, :] * STRIDE, mask=w_mask, other=0.0).to(t.dtype)
        # Three TF32 products hold both halves of the tile in registers: too many beyond 128 columns.
        WIDE: tl.constexpr = "ieee" if PRECISION == "tf32x3" and MP * RP > 128 else PRECISION
        y = tl.dot(t, w_tile, input_precision=WIDE)
        if bias is not None and gates is not None:
            y = gated_bias(y, gates, bias, c, inside, C, M, GP, PRECISION)
        if MASKED and MP > 1:
            spoilt = tl.where(y == y, spoilt, 1)
        if bias is not None and gates is None:
            y += bias_at(bias, expert, c, inside, valid, C, MASKED)
        if added is not None:
            y += tl.load(added + offsets + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + offsets + c[None, :], narrow(y, out.dtype.element_ty), mask=mask)
    return spoilt
