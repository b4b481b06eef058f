"""Device functions of gates: what weighs every row's slots, and narrow tiles of several experts a row.

A side of a gated op is one of three: "one" (a bank of one expert: RP columns), "every" (dense gates: slot e is expert
e, its columns e * RP on) or "chosen" (a row's K slots name its experts among all those of the bank, whose columns lie
side by side as in _routed_tiles.py). Gates and indices lie alike: row n's slot k at (n // div) * K + k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_utils import INTERPRETING, narrow
from ._routed_tiles import _expand, bank_columns, expand, keep_own, spread

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def times(x, y):
    """x * y, float32, rounded before any sum: fused into one across lanes, each lane would round another's product
    but not its own, so that copies of the sum differ in their last bit.
    """
    if _INTERPRETING:
        return x * y
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def gate_of(gates, div, rows, valid, slot, K: tl.constexpr):
    """The gate of every row's slot, float32 [ROWS]."""
    return tl.load(gates + (rows // div).to(tl.int64) * K + slot, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def gate_tile(gates, div, rows, valid, K: tl.constexpr, KP: tl.constexpr):
    """The gates of every row's slots, float32 [ROWS, KP], 0 beyond K."""
    slot = tl.arange(0, KP)
    at = gates + (rows // div).to(tl.int64)[:, None] * K + slot[None, :]
    return tl.load(at, mask=valid[:, None] & (slot < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def gate_sum(gates, div, rows, valid, K: tl.constexpr):
    """The sum of every row's gates, float32 [ROWS]."""
    total = tl.zeros([rows.shape[0]], tl.float32)
    for slot in tl.static_range(K):
        total += gate_of(gates, div, rows, valid, slot, K)
    return total


@triton.jit
def expert_of(index, div, rows, valid, slot, K: tl.constexpr, M: tl.constexpr):
    """(expert that every row's slot names [ROWS], rows where it is none of the M); without an index expert 0."""
    if index is None:
        return rows * 0, rows < 0
    else:
        ids = tl.load(index + (rows // div).to(tl.int64) * K + slot, mask=valid, other=0).to(tl.int64)
        return tl.minimum(tl.maximum(ids, 0), M - 1).to(tl.int32), (ids < 0) | (ids >= M)


@triton.jit
def wrong_rows(index, div, rows, valid, K: tl.constexpr, M: tl.constexpr):
    """[ROWS] rows of which a slot names no expert of the M."""
    wrong = rows < 0
    for slot in tl.static_range(K):
        wrong = wrong | expert_of(index, div, rows, valid, slot, K, M)[1]
    return wrong


@triton.jit
def any_wrong(index, at, valid, M: tl.constexpr, SLOTS: tl.constexpr):
    """[ROWS] rows one of whose ids is outside the bank of M."""
    wrong = at < 0
    if index is not None:
        for slot in range(SLOTS):
            ids = tl.load(index + at * SLOTS + slot, mask=valid, other=0)
            wrong = wrong | (ids < 0) | (ids >= M)
    return wrong


@triton.jit
def expert_gates(
    gates, index, div, rows, valid, K: tl.constexpr, M: tl.constexpr, GP: tl.constexpr, SIDE: tl.constexpr
):  # fmt: skip
    """What weighs every expert of a side, float32 [ROWS, GP]: the sum of the gates of a row's slots that name it."""
    if SIDE == "every":
        return gate_tile(gates, div, rows, valid, K, GP)
    else:
        e = tl.arange(0, GP)[None, :]
        found = tl.zeros([rows.shape[0], GP], tl.float32)
        for slot in tl.static_range(K):
            gate = gate_of(gates, div, rows, valid, slot, K)
            expert, _ = expert_of(index, div, rows, valid, slot, K, M)
            found += tl.where(expert[:, None] == e, gate[:, None], 0.0)
        return found


@triton.jit
def weigh(wide, gates, RP: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, MP * RP] with the columns of expert e times gates [ROWS, MP]."""
    return tl.reshape(times(tl.reshape(wide, [ROWS, MP, RP]), gates[:, :, None]), [ROWS, MP * RP])


@triton.jit
def spread_all(own, RP: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, RP] -> [ROWS, MP * RP]: the same for every expert."""
    return tl.reshape(tl.broadcast_to(own[:, None, :], [ROWS, MP, RP]), [ROWS, MP * RP])


@triton.jit
def sum_experts(wide, RP: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, MP * RP] -> [ROWS, RP]."""
    return tl.sum(tl.reshape(wide, [ROWS, MP, RP]), axis=1)


@triton.jit
def sum_columns(wide, RP: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, MP * RP] -> [ROWS, MP]: the sum of every expert's columns."""
    return tl.sum(tl.reshape(wide, [ROWS, MP, RP]), axis=2)


@triton.jit
def side_columns(bank, SIZE, STRIDE, R, RP: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, SIDE: tl.constexpr):
    """`bank_columns` of a side: of all its experts."""
    return bank_columns(bank, 0, SIZE, STRIDE, R, RP, M, MP, SIDE != "one")


@triton.jit
def own_of(wide, expert, RP: tl.constexpr, MP: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, MP * RP] -> [ROWS, RP]: a row's columns of one expert."""
    return keep_own(wide, expert, RP, MP, SIDE == "chosen", ROWS)


@triton.jit
def spread_to(own, expert, RP: tl.constexpr, MP: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, RP] -> [ROWS, MP * RP]: a row's values in the columns of one expert, zero elsewhere."""
    return spread(own, expert, RP, MP, SIDE == "chosen", ROWS)


@triton.jit
def lift(
    own, gates, index, div, rows, valid, K: tl.constexpr, M: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr,
    SIDE: tl.constexpr, WEIGH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[ROWS, RP] -> [ROWS, MP * RP]: for every expert what its gates weigh of it; a bank of one's only where WEIGH."""
    if SIDE == "every":
        return weigh(spread_all(own, RP, MP, ROWS), gate_tile(gates, div, rows, valid, K, MP), RP, MP, ROWS)
    elif SIDE == "chosen":
        wide = tl.zeros([ROWS, MP * RP], tl.float32)
        for slot in tl.static_range(K):
            gate = gate_of(gates, div, rows, valid, slot, K)
            expert, _ = expert_of(index, div, rows, valid, slot, K, M)
            wide += spread_to(own * gate[:, None], expert, RP, MP, SIDE, ROWS)
        return wide
    else:
        if WEIGH:
            own = own * gate_sum(gates, div, rows, valid, K)[:, None]
        return spread_to(own, 0, RP, MP, SIDE, ROWS)


@triton.jit
def mean(
    wide, gates, index, div, rows, valid, K: tl.constexpr, M: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr,
    SIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[ROWS, MP * RP] -> [ROWS, RP]: the sum of the experts' columns, each times its gates; a bank of one's as is."""
    if SIDE == "every":
        return sum_experts(weigh(wide, gate_tile(gates, div, rows, valid, K, MP), RP, MP, ROWS), RP, MP, ROWS)
    elif SIDE == "chosen":
        own = tl.zeros([ROWS, RP], tl.float32)
        for slot in tl.static_range(K):
            gate = gate_of(gates, div, rows, valid, slot, K)
            expert, _ = expert_of(index, div, rows, valid, slot, K, M)
            own += own_of(wide, expert, RP, MP, SIDE, ROWS) * gate[:, None]
        return own
    else:
        return own_of(wide, 0, RP, MP, SIDE, ROWS)


@triton.jit
def shrink_beside(
    z, rows, valid, columns, live, bias, STRIDE,
    C: tl.constexpr, M: tl.constexpr, GP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`shrink`, and beside it z times every expert's bias [M, C]: float32 [ROWS, WIDTH] and [ROWS, GP]."""
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    beside = tl.zeros([ROWS, GP], tl.float32)
    rows = rows.to(tl.int64) * C
    e = tl.arange(0, GP)
    for start in range(0, C, COLS):
        c = start + tl.arange(0, COLS)
        z_mask = valid[:, None]
        w_mask = live[None, :]
        b_mask = (e < M)[None, :]
        if C % COLS != 0:
            z_mask = z_mask & (c < C)[None, :]
            w_mask = w_mask & (c < C)[:, None]
            b_mask = b_mask & (c < C)[:, None]
        z_tile = tl.load(z + rows[:, None] + c[None, :], mask=z_mask, other=0.0).to(DOT)
        w_tile = tl.load(columns[None, :] + c[:, None] * STRIDE, mask=w_mask, other=0.0).to(DOT)
        b_tile = tl.load(bias + e[None, :] * C + c[:, None], mask=b_mask, other=0.0).to(DOT)
        acc = tl.dot(z_tile, w_tile, acc, input_precision=PRECISION)
        beside = tl.dot(z_tile, b_tile, beside, input_precision=PRECISION)
    return acc, beside


@triton.jit
def expand_side(
    t, columns, live, STRIDE, bias, weights, added, tiles, out, rows, valid, index, div,
    C: tl.constexpr, K: tl.constexpr, M: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr, GP: tl.constexpr,
    SIDE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, AHEAD: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """`expand` of a tile of several experts a row; weights weigh the experts' biases, see there."""
    if SIDE != "chosen":
        expand(
            t, 0, columns, live, STRIDE, bias, added, tiles, out, rows, valid,
            C, M, RP, MP, False, PRECISION, ROWS, COLS, AHEAD, KEEP, weights, GP,
        )  # fmt: skip
    else:
        offsets = rows.to(tl.int64)[:, None] * C
        spoilt = _expand(
            t, 0, columns, live, STRIDE, bias, added, out, offsets, valid,
            C, RP, MP, True, PRECISION, ROWS, COLS, AHEAD + 1, weights, M, GP,
        )  # fmt: skip
        if tl.max(tl.reshape(spoilt, [ROWS * COLS], can_reorder=True), 0) > 0:
            # An infinity among the weights of an expert that a row does not name reached it, as 0 * inf: row by row,
            # with the columns of its own experts alone, so that what is right has the same bits.
            for n in range(ROWS):
                one = tl.arange(0, ROWS) == n
                row = tl.max(tl.where(one, rows, 0), axis=0)
                exists = tl.max(tl.where(one & valid, 1, 0), axis=0) > 0
                m = tl.arange(0, MP * RP) // RP
                e = tl.arange(0, GP)
                named, known = m < 0, e < 0
                for slot in tl.static_range(K):
                    own, _ = expert_of(index, div, row, exists, slot, K, M)
                    named, known = named | (m == own), known | (e == own)
                _expand_row(
                    t, columns, live & named, STRIDE, bias, known, weights, added, out, offsets, valid & one,
                    C, M, MP * RP, GP, PRECISION,
                )  # fmt: skip


@triton.jit
def _expand_row(
    t, columns, live, STRIDE, bias, known, weights, added, out, offsets, valid,
    C: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, GP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_expand` of the one valid row with the columns and biases it names, 16 features a step for the registers."""
    e = tl.arange(0, GP)
    WIDE: tl.constexpr = "ieee" if PRECISION == "tf32x3" and WIDTH > 128 else PRECISION
    for start in range(0, C, 16):
        c = start + tl.arange(0, 16)
        inside = (c < C)[None, :]
        w_tile = tl.load(columns[:, None] + c[None, :] * STRIDE, mask=live[:, None] & inside, other=0.0).to(t.dtype)
        y = tl.dot(t, w_tile, input_precision=WIDE)
        if bias is not None:
            b_mask = (known & (e < M))[:, None] & inside
            b_tile = tl.load(bias + e[:, None] * C + c[None, :], mask=b_mask, other=0.0).to(t.dtype)
            y = tl.dot(weights, b_tile, y, input_precision=PRECISION)
        if added is not None:
            y += tl.load(added + offsets + c[None, :], mask=valid[:, None] & inside, other=0.0).to(tl.float32)
        tl.store(out + offsets + c[None, :], narrow(y, out.dtype.element_ty), mask=valid[:, None] & inside)
