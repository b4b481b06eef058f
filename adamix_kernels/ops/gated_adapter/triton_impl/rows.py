"""The gated adapter where a tile cannot hold all experts: a row for each slot of each row of x, grouped by expert.

Row e is slot e % K of row e // K of x, and a tile of such rows has one expert. A side whose bank holds one expert has
the rows of x themselves. What stands between the two sides is narrow: pre, and in the backward u = dy Wu.

    forward    pre = x Wd + bd by rows of the first side; the wide result by rows of the second
    backward   u = dy Wu by rows of the second side; all else by rows of the first

The wide results of a row's slots are written apart and summed in their order (ops/_gated_sum.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import activate, activation_slope, narrow
from ..._gated_tiles import any_wrong, gate_of, gate_sum, shrink_beside, times
from ..._routed_tiles import bank_columns, bias_at, expand, poison, shrink, tile_experts, tile_rows


@triton.jit
def _expert(index, rows, valid, first, perm, K: tl.constexpr, M: tl.constexpr):
    """The one expert of a tile's rows; dense gates have no index."""
    if M > 1 and index is None:
        return (first % K).to(tl.int64)
    else:
        return tile_experts(index, 1, rows, valid, first, perm, M, False)[0]


@triton.jit
def _wrong(down_index, up_index, own, valid, div, K: tl.constexpr, MD: tl.constexpr, MU: tl.constexpr):
    at = (own // div).to(tl.int64)
    return any_wrong(down_index, at, valid, MD, K) | any_wrong(up_index, at, valid, MU, K)


@triton.jit
def _narrow_rows(z, rows, valid, k, R: tl.constexpr):
    """Rows of z [., R], float32."""
    at = z + rows.to(tl.int64)[:, None] * R + k[None, :]
    return tl.load(at, mask=valid[:, None] & (k < R)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_rows(z, values, rows, valid, k, R: tl.constexpr):
    at = z + rows.to(tl.int64)[:, None] * R + k[None, :]
    tl.store(at, narrow(values, z.dtype.element_ty), mask=valid[:, None] & (k < R)[None, :])


@triton.jit
def _over_slots(
    z, gates, own, valid, div, k, K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Of each row of x the sum of its gates times act of its slots' rows of z, float32 [ROWS, RP]."""
    total = tl.zeros([own.shape[0], RP], tl.float32)
    for slot in range(K):
        one = activate(_narrow_rows(z, own * K + slot, valid, k, R), ACTIVATION)
        total += one * gate_of(gates, div, own, valid, slot, K)[:, None]
    return total


@triton.jit(do_not_specialize=["span", "div"])
def gated_adapter_rows_shrink_kernel(
    z, bank, bias, weighed, index, down_index, up_index, out, beside, perm, tile_start, tile_stop, span, div,
    C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, M: tl.constexpr, UP: tl.constexpr,
    MD: tl.constexpr, MU: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out [., R] = z W[e]^T (+ bias[e]), W [M, R, C] or, UP, [M, C, R]; beside [.] = <z, weighed[e]>.

    A row of x with a wrong id anywhere is 0. bias, weighed and beside may be None.
    """
    rows, valid, first = tile_rows(span, perm, tile_start, tile_stop, ROWS)
    own = rows // K if M > 1 else rows
    expert = _expert(index, rows, valid, first, perm, K, M)
    wrong = _wrong(down_index, up_index, own, valid, div, K, MD, MU)
    k = tl.arange(0, RP)
    step: tl.constexpr = R if UP else 1
    columns, live = bank_columns(bank, expert, R * C, 1 if UP else C, R, RP, M, 1, False)
    if weighed is not None:
        wide, found = shrink_beside(
            z, own, valid, columns, live, weighed + expert * C, step, C, 1, 16, DOT, PRECISION, ROWS, COLS, RP
        )
        # An infinity of z is NaN in the columns of no expert.
        found = tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, found, 0.0), axis=1)
        tl.store(beside + rows, tl.where(wrong, 0.0, found), mask=valid)
    else:
        wide = shrink(z, own, valid, columns, live, step, C, DOT, PRECISION, ROWS, COLS, RP)
    if bias is not None:
        wide += bias_at(bias, expert, k, k < R, valid, R, False)
    _store_rows(out, tl.where(wrong[:, None], 0.0, wide), rows, valid, k, R)


@triton.jit(do_not_specialize=["span", "div"])
def gated_adapter_rows_forward_kernel(
    pre, up_weight, up_bias, index, down_index, up_index, gates, residual, out, perm, tile_start, tile_stop, span, div,
    O: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr,  # noqa: E741
    MD: tl.constexpr, MU: tl.constexpr, WEIGHTS: tl.constexpr, ACTIVATION: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """out = Wu[j] h + the gates of bu[j], for rows of the second side; of one expert with the residual, which else the
    sum adds.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    rows, valid, first = tile_rows(span, perm, tile_start, tile_stop, ROWS)
    own = rows // K if MU > 1 else rows
    j = _expert(index, rows, valid, first, perm, K, MU)
    wrong = _wrong(down_index, up_index, own, valid, div, K, MD, MU)
    k = tl.arange(0, RP)
    weights = None
    if MD > 1 and WEIGHTS:
        h = activate(_over_slots(pre, gates, own, valid, div, k, K, R, RP, ""), ACTIVATION)
    elif MD > 1 and MU == 1:
        h = _over_slots(pre, gates, own, valid, div, k, K, R, RP, ACTIVATION)
        weights = gate_sum(gates, div, own, valid, K)
    else:
        h = activate(_narrow_rows(pre, rows if MD > 1 else own, valid, k, R), ACTIVATION)
    if MU > 1:
        weights = gate_of(gates, div, own, valid, rows % K, K)
        h = h * weights[:, None]
    h = narrow(poison(h, wrong), dtype).to(DOT)
    columns, live = bank_columns(up_weight, j, O * R, 1, R, RP, MU, 1, False)
    bias = None
    if up_bias is not None:
        bias = up_bias + j * O
    expand(
        h, first * 0, columns, live, R, bias, residual, 0, out, rows, valid,
        O, MU, RP, 1, False, PRECISION, ROWS, COLS, AHEAD, False, weights,
    )  # fmt: skip


@triton.jit(do_not_specialize=["span", "div"])
def gated_adapter_rows_grad_kernel(
    pre, u, beside, down_weight, index, down_index, up_index, gates, grad_out, dpre, h, weights, dgates, dx,
    perm, tile_start, tile_stop, span, div,
    H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr,
    MD: tl.constexpr, MU: tl.constexpr, WEIGHTS: tl.constexpr, ACTIVATION: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """From pre and u, for rows of the first side: dgates [., K], dpre and dx of them, and h and weights, what the rows
    of the second side are multiplied with in the gradients of Wu and bu. Formulas: input_grad.py.

    dx is of a row (of a bank of one with grad_out, which else the sum adds). All from beside on may be None.
    """
    dtype: tl.constexpr = pre.dtype.element_ty
    rows, valid, first = tile_rows(span, perm, tile_start, tile_stop, ROWS)
    own = rows // K if MD > 1 else rows
    i = _expert(index, rows, valid, first, perm, K, MD)
    wrong = _wrong(down_index, up_index, own, valid, div, K, MD, MU)
    k = tl.arange(0, RP)
    one = _narrow_rows(pre, rows, valid, k, R)
    if MD > 1:
        slot = rows % K
        gate = gate_of(gates, div, own, valid, slot, K)
        mine = _narrow_rows(u, rows if MU > 1 else own, valid, k, R)
        found = tl.zeros([ROWS], tl.float32)
        if WEIGHTS:
            z = _over_slots(pre, gates, own, valid, div, k, K, R, RP, "")
            act = activate(z, ACTIVATION)
            g = mine
            if MU > 1:
                g = _over_slots(u, gates, own, valid, div, k, K, R, RP, "")
                found += tl.sum(times(act, mine), axis=1)
            g *= activation_slope(z, ACTIVATION)
            found += tl.sum(times(one, g), axis=1)
        else:
            act = activate(one, ACTIVATION)
            found += tl.sum(times(act, mine), axis=1)
            g = mine * activation_slope(one, ACTIVATION)
        g *= gate[:, None]
        if dgates is not None:
            if beside is not None:
                found += tl.load(beside + (rows if MU > 1 else own), mask=valid, other=0.0)
            found = narrow(tl.where(wrong, float("nan"), found), dgates.dtype.element_ty)
            tl.store(dgates + rows.to(tl.int64), found, mask=valid)
        if h is not None:
            if MU > 1:
                act = tl.where(wrong[:, None], 0.0, act * gate[:, None])
                _store_rows(h, act, rows, valid, k, R)
                tl.store(weights + rows, narrow(tl.where(wrong, 0.0, gate), dtype), mask=valid)
            else:
                # Of a row of x its first slot writes.
                leads = valid & (slot == 0)
                if WEIGHTS:
                    total = tl.zeros([ROWS], tl.float32) + 1.0
                else:
                    act = _over_slots(pre, gates, own, leads, div, k, K, R, RP, ACTIVATION)
                    total = gate_sum(gates, div, own, leads, K)
                _store_rows(h, tl.where(wrong[:, None], 0.0, act), own, leads, k, R)
                tl.store(weights + own, narrow(tl.where(wrong, 0.0, total), dtype), mask=leads)
    else:
        act = activate(one, ACTIVATION)
        g = tl.zeros([ROWS, RP], tl.float32)
        for slot in range(K):
            gate = gate_of(gates, div, own, valid, slot, K)
            mine = _narrow_rows(u, own * K + slot, valid, k, R)
            at = own.to(tl.int64) * K + slot
            g += mine * gate[:, None]
            if dgates is not None:
                found = tl.sum(times(act, mine), axis=1)
                if beside is not None:
                    found += tl.load(beside + at, mask=valid, other=0.0)
                found = narrow(tl.where(wrong, float("nan"), found), dgates.dtype.element_ty)
                tl.store(dgates + at, found, mask=valid)
            if h is not None:
                _store_rows(h, tl.where(wrong[:, None], 0.0, act * gate[:, None]), own * K + slot, valid, k, R)
                tl.store(weights + at, narrow(tl.where(wrong, 0.0, gate), dtype), mask=valid)
        g *= activation_slope(one, ACTIVATION)
    # As in the forward: NaN in dx, nothing for the experts.
    g = tl.where(wrong[:, None], 0.0, g)
    if dpre is not None:
        _store_rows(dpre, g, rows, valid, k, R)
    if dx is not None:
        g = narrow(poison(g, wrong), dtype).to(DOT)
        columns, live = bank_columns(down_weight, i, R * H, H, R, RP, MD, 1, False)
        expand(
            g, first * 0, columns, live, 1, None, grad_out, 0, dx, rows, valid,
            H, MD, RP, 1, False, PRECISION, ROWS, COLS, AHEAD, False,
        )  # fmt: skip
