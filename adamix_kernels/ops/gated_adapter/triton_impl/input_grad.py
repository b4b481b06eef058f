"""First launch of the backward: gradients of the gates, of the pre-activations and of x; what the second one takes.

Traffic: dy and dx once, pre [N, slots * r], and for the second launch the gradients of the pre-activations and the
gated activations, each in the columns of its experts. Where dx holds dy too and a tile of it fits in registers (KEEP),
it stays there; else its second read is one more, which L2 serves in part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import activate, activation_slope, narrow
from ..._gated_tiles import (
    expand_side,
    expert_gates,
    expert_of,
    gate_of,
    gate_sum,
    gate_tile,
    lift,
    mean,
    own_of,
    shrink_beside,
    side_columns,
    spread_all,
    spread_to,
    sum_columns,
    sum_experts,
    times,
    weigh,
    wrong_rows,
)
from ..._routed_tiles import all_tiles, poison, shrink, shrink_tiles, tile_rows


@triton.jit
def _of_expert(beside, expert, GP: tl.constexpr):
    """[ROWS, GP] -> [ROWS]: a row's value for one expert."""
    return tl.sum(tl.where(tl.arange(0, GP)[None, :] == expert[:, None], beside, 0.0), axis=1)


@triton.jit
def _first(beside, KP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, GP] -> [ROWS, KP]; the columns beyond the experts hold zero."""
    return tl.sum(tl.reshape(beside, [ROWS, GP // KP, KP]), axis=1)


@triton.jit
def _store_every(dgates, found, wrong, rows, valid, K: tl.constexpr, KP: tl.constexpr):
    """dgates [., K] of the tile's rows from [ROWS, KP]."""
    slot = tl.arange(0, KP)
    found = narrow(poison(found, wrong), dgates.dtype.element_ty)
    mask = valid[:, None] & (slot < K)[None, :]
    tl.store(dgates + rows.to(tl.int64)[:, None] * K + slot[None, :], found, mask=mask)


@triton.jit
def _store_slot(dgates, found, wrong, rows, valid, slot, K: tl.constexpr):
    found = narrow(tl.where(wrong, float("nan"), found), dgates.dtype.element_ty)
    tl.store(dgates + rows.to(tl.int64) * K + slot, found, mask=valid)


@triton.jit(do_not_specialize=["span", "div"])
def gated_adapter_input_grad_kernel(
    grad_out, pre, up_weight, down_weight, up_bias, up_index, down_index, gates, dpre, h, weights, dgates, dx,
    span, div,
    H: tl.constexpr, O: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr,  # noqa: E741
    MD: tl.constexpr, MDP: tl.constexpr, DOWN: tl.constexpr,
    MU: tl.constexpr, MUP: tl.constexpr, UP: tl.constexpr, GP: tl.constexpr,
    WEIGHTS: tl.constexpr, ACTIVATION: tl.constexpr, ADD_GRAD: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, AHEAD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """For one tile of rows, with u = dy Wu, every expert's columns:

        d g_k = <act(pre_k), u_k> + <bu[j_k], dy>        d pre_k = g_k u_k act'(pre_k)
        h_e = the sum of g_k act(pre_k) over the slots with j_k = e, likewise d pre_e by i_k, and dx = d pre Wd (+ dy)

    and with WEIGHTS, where z = sum_k g_k pre_k and d z = act'(z) sum_k g_k u_k,

        d g_k = <act(z), u_k> + <bu[j_k], dy> + <d z, pre_k>, the second bank's and the first's unless it is of one.

    dpre [., MD * R], h [., MU * R] with weights [., GP], what weighs each expert's bias up, dgates and dx may be None.
    KEEP: dx is wanted, and dy is added to it.
    """
    dtype: tl.constexpr = pre.dtype.element_ty
    rows, valid, _ = tile_rows(span, None, None, None, ROWS)
    tiles = 0
    if KEEP:
        tiles = all_tiles(grad_out, rows, valid, O, COLS)
    e = tl.arange(0, GP)
    beside = tl.zeros([ROWS, GP], tl.float32)
    columns, live = side_columns(up_weight, O * R, 1, R, RP, MU, MUP, UP)
    if KEEP:
        u = shrink_tiles(tiles, columns, live, R, O, DOT, ROWS, COLS, MUP * RP, AHEAD)
        if up_bias is not None:
            beside = shrink_tiles(tiles, up_bias + e * O, e < MU, 1, O, DOT, ROWS, COLS, GP, AHEAD)
    elif up_bias is not None:
        u, beside = shrink_beside(
            grad_out, rows, valid, columns, live, up_bias, R, O, MU, GP, DOT, PRECISION, ROWS, COLS, MUP * RP
        )
    else:
        u = shrink(grad_out, rows, valid, columns, live, R, O, DOT, PRECISION, ROWS, COLS, MUP * RP)
    # As in the forward: NaN in dx and in the gates' gradient, nothing for the experts.
    wrong = wrong_rows(down_index, div, rows, valid, K, MD) | wrong_rows(up_index, div, rows, valid, K, MU)

    k = tl.arange(0, RP)
    column = tl.arange(0, MDP * RP)
    at = column // RP * R + column % RP
    row = rows.to(tl.int64)[:, None]
    mask = valid[:, None] & (k < R)[None, :]
    _, live = side_columns(down_weight, R * H, H, R, RP, MD, MDP, DOWN)
    wide_mask = valid[:, None] & live[None, :]
    if UP == "one":
        u = own_of(u, 0, RP, MUP, UP, ROWS)
    if DOWN == "every":
        z = tl.load(pre + row * (MD * R) + at[None, :], mask=wide_mask, other=0.0).to(tl.float32)
    elif DOWN == "one":
        z = tl.load(pre + row * R + k[None, :], mask=mask, other=0.0).to(tl.float32)

    if WEIGHTS:
        # g: d z, own: z, [ROWS, RP]
        if DOWN == "every":
            own = mean(z, gates, down_index, div, rows, valid, K, MD, RP, MDP, DOWN, ROWS)
        elif DOWN == "chosen":
            own = tl.zeros([ROWS, RP], tl.float32)
            for slot in tl.static_range(K):
                one = tl.load(pre + row * (K * R) + slot * R + k[None, :], mask=mask, other=0.0).to(tl.float32)
                own += one * gate_of(gates, div, rows, valid, slot, K)[:, None]
        else:
            own = z
        act = activate(own, ACTIVATION)
        if UP == "one":
            g = u
        else:
            g = mean(u, gates, up_index, div, rows, valid, K, MU, RP, MUP, UP, ROWS)
        g = tl.where(wrong[:, None], 0.0, g * activation_slope(own, ACTIVATION))
        if dgates is not None:
            if DOWN == "every" or UP == "every":
                KP: tl.constexpr = MDP if DOWN == "every" else MUP
                found = tl.zeros([ROWS, KP], tl.float32)
                if UP == "every":
                    found += sum_columns(times(u, spread_all(act, RP, MUP, ROWS)), RP, MUP, ROWS)
                    if up_bias is not None:
                        found += _first(beside, KP, GP, ROWS)
                if DOWN == "every":
                    found += sum_columns(times(z, spread_all(g, RP, MDP, ROWS)), RP, MDP, ROWS)
                _store_every(dgates, found, wrong, rows, valid, K, KP)
            else:
                for slot in tl.static_range(K):
                    found = tl.zeros([ROWS], tl.float32)
                    if UP == "chosen":
                        j, _ = expert_of(up_index, div, rows, valid, slot, K, MU)
                        found += tl.sum(times(act, own_of(u, j, RP, MUP, UP, ROWS)), axis=1)
                        if up_bias is not None:
                            found += _of_expert(beside, j, GP)
                    if DOWN == "chosen":
                        one = tl.load(pre + row * (K * R) + slot * R + k[None, :], mask=mask, other=0.0)
                        found += tl.sum(times(one.to(tl.float32), g), axis=1)
                    _store_slot(dgates, found, wrong, rows, valid, slot, K)
        act = lift(act, gates, up_index, div, rows, valid, K, MU, RP, MUP, UP, False, ROWS)
        g = lift(g, gates, down_index, div, rows, valid, K, MD, RP, MDP, DOWN, False, ROWS)
    elif DOWN == "every":
        own = gate_tile(gates, div, rows, valid, K, MDP)
        act = activate(z, ACTIVATION)
        if UP == "one":
            u = spread_all(u, RP, MDP, ROWS)
        if dgates is not None:
            found = sum_columns(times(act, u), RP, MDP, ROWS)
            if up_bias is not None and UP == "one":
                found += tl.sum(beside, axis=1)[:, None]
            elif up_bias is not None:
                found += _first(beside, MDP, GP, ROWS)
            _store_every(dgates, found, wrong, rows, valid, K, MDP)
        g = weigh(u * activation_slope(z, ACTIVATION), own, RP, MDP, ROWS)
        act = weigh(act, own, RP, MDP, ROWS)
        if UP == "one":
            act = spread_to(sum_experts(act, RP, MDP, ROWS), 0, RP, MUP, UP, ROWS)
    elif DOWN == "one":
        act = activate(z, ACTIVATION)
        if dgates is not None:
            if UP == "every":
                found = sum_columns(times(u, spread_all(act, RP, MUP, ROWS)), RP, MUP, ROWS)
                if up_bias is not None:
                    found += _first(beside, MUP, GP, ROWS)
                _store_every(dgates, found, wrong, rows, valid, K, MUP)
            else:
                for slot in tl.static_range(K):
                    if UP == "chosen":
                        j, _ = expert_of(up_index, div, rows, valid, slot, K, MU)
                        found = tl.sum(times(act, own_of(u, j, RP, MUP, UP, ROWS)), axis=1)
                    else:
                        j = rows * 0
                        found = tl.sum(times(act, u), axis=1)
                    if up_bias is not None:
                        found += _of_expert(beside, j, GP)
                    _store_slot(dgates, found, wrong, rows, valid, slot, K)
        if UP == "one":
            g = u * gate_sum(gates, div, rows, valid, K)[:, None]
        else:
            g = mean(u, gates, up_index, div, rows, valid, K, MU, RP, MUP, UP, ROWS)
        g = spread_to(g * activation_slope(z, ACTIVATION), 0, RP, MDP, DOWN, ROWS)
        act = lift(act, gates, up_index, div, rows, valid, K, MU, RP, MUP, UP, True, ROWS)
    else:
        act = tl.zeros([ROWS, MUP * RP], tl.float32)
        g = tl.zeros([ROWS, MDP * RP], tl.float32)
        for slot in tl.static_range(K):
            one = tl.load(pre + row * (K * R) + slot * R + k[None, :], mask=mask, other=0.0).to(tl.float32)
            i, _ = expert_of(down_index, div, rows, valid, slot, K, MD)
            j, _ = expert_of(up_index, div, rows, valid, slot, K, MU)
            gate = gate_of(gates, div, rows, valid, slot, K)
            if UP == "one":
                own = u
            else:
                own = own_of(u, j, RP, MUP, UP, ROWS)
            done = activate(one, ACTIVATION)
            if dgates is not None:
                found = tl.sum(times(done, own), axis=1)
                if up_bias is not None:
                    found += _of_expert(beside, j, GP)
                _store_slot(dgates, found, wrong, rows, valid, slot, K)
            act += spread_to(done * gate[:, None], j, RP, MUP, UP, ROWS)
            g += spread_to(own * activation_slope(one, ACTIVATION) * gate[:, None], i, RP, MDP, DOWN, ROWS)
    g = tl.where(wrong[:, None], 0.0, g)
    if h is not None:
        up_column = tl.arange(0, MUP * RP)
        _, up_live = side_columns(up_weight, O * R, 1, R, RP, MU, MUP, UP)
        to = h + row * (MU * R) + (up_column // RP * R + up_column % RP)[None, :]
        act = narrow(tl.where(wrong[:, None], 0.0, act), dtype)
        tl.store(to, act, mask=valid[:, None] & up_live[None, :])
        if WEIGHTS and UP == "one":
            found = tl.zeros([ROWS, GP], tl.float32) + tl.where(e == 0, 1.0, 0.0)[None, :]
        else:
            found = expert_gates(gates, up_index, div, rows, valid, K, MU, GP, UP)
        found = narrow(tl.where(wrong[:, None], 0.0, found), dtype)
        tl.store(weights + row * GP + e[None, :], found, mask=valid[:, None])
    if dpre is not None:
        tl.store(dpre + row * (MD * R) + at[None, :], narrow(g, dtype), mask=wide_mask)

    if dx is not None:
        g = narrow(poison(g, wrong), dtype).to(DOT)
        columns, live = side_columns(down_weight, R * H, H, R, RP, MD, MDP, DOWN)
        expand_side(
            g, columns, live, 1, None, None, grad_out if ADD_GRAD else None, tiles, dx, rows, valid, down_index, div,
            H, K, MD, RP, MDP, GP, DOWN, PRECISION, ROWS, COLS, AHEAD, KEEP,
        )  # fmt: skip
