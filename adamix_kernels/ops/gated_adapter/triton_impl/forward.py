"""Forward kernel: one launch from x to the output, all experts' narrow columns in one tile.

Traffic: x and the output once, the pre-activations [N, slots * r] and the gates. Where the residual is x and a tile of
it fits in registers (KEEP), it stays there; else the residual's read is one more, which L2 serves in part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import activate, narrow
from ..._gated_tiles import (
    expand_side,
    expert_gates,
    expert_of,
    gate_of,
    gate_sum,
    gate_tile,
    lift,
    own_of,
    side_columns,
    spread_to,
    sum_experts,
    weigh,
    wrong_rows,
)
from ..._routed_tiles import all_tiles, bias_at, poison, shrink, shrink_tiles, tile_rows


@triton.jit(do_not_specialize=["span", "div"])
def gated_adapter_forward_kernel(
    x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, gates, residual, out, pre, span, div,
    H: tl.constexpr, O: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr,  # noqa: E741
    MD: tl.constexpr, MDP: tl.constexpr, DOWN: tl.constexpr,
    MU: tl.constexpr, MUP: tl.constexpr, UP: tl.constexpr, GP: tl.constexpr,
    WEIGHTS: tl.constexpr, SAME: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, AHEAD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One tile of rows of the output, and pre [ROWS, slots * R].

    out = residual + sum_k g_k (Wu[j_k] act(x Wd[i_k]^T + bd[i_k]) + bu[j_k]), or with WEIGHTS
    out = residual + sum_k g_k (Wu[j_k] z + bu[j_k]), z = act(sum_k g_k (x Wd[i_k]^T + bd[i_k])).
    DOWN, UP: "one", "every" or "chosen", of _gated_tiles.py. SAME: a slot's ids are one. KEEP: residual is x.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    rows, valid, _ = tile_rows(span, None, None, None, ROWS)
    tiles = 0
    if KEEP:
        tiles = all_tiles(x, rows, valid, H, COLS)
    columns, live = side_columns(down_weight, R * H, H, R, RP, MD, MDP, DOWN)
    if KEEP:
        wide = shrink_tiles(tiles, columns, live, 1, H, DOT, ROWS, COLS, MDP * RP, AHEAD)
    else:
        wide = shrink(x, rows, valid, columns, live, 1, H, DOT, PRECISION, ROWS, COLS, MDP * RP)
    # A row with a wrong id is NaN in the output; what is saved of it is 0, so that it teaches no expert.
    wrong = wrong_rows(down_index, div, rows, valid, K, MD) | wrong_rows(up_index, div, rows, valid, K, MU)

    k = tl.arange(0, RP)
    column = tl.arange(0, MDP * RP)
    at = column // RP * R + column % RP
    row = rows.to(tl.int64)[:, None]
    mask = valid[:, None] & (k < R)[None, :]
    # Padded columns hold act(0) = 0.
    if DOWN == "every":
        if down_bias is not None:
            wide += tl.load(down_bias + at, mask=live, other=0.0).to(tl.float32)[None, :]
        tl.store(pre + row * (MD * R) + at[None, :], narrow(wide, dtype), mask=valid[:, None] & live[None, :])
        own = gate_tile(gates, div, rows, valid, K, MDP)
        if WEIGHTS:
            h = activate(sum_experts(weigh(wide, own, RP, MDP, ROWS), RP, MDP, ROWS), ACTIVATION)
        else:
            h = weigh(activate(wide, ACTIVATION), own, RP, MDP, ROWS)
            if UP == "one":
                h = sum_experts(h, RP, MDP, ROWS)
    elif SAME and not WEIGHTS:
        # No column moves to another expert's: all are activated in place, and those that no slot names are dropped.
        if down_bias is not None:
            wide += tl.load(down_bias + at, mask=live, other=0.0).to(tl.float32)[None, :]
        wide = tl.where(wrong[:, None], 0.0, wide)
        m = tl.arange(0, MDP)[None, :]
        own = tl.zeros([ROWS, MDP], tl.float32)
        named = wrong[:, None] & (m < 0)
        for slot in tl.static_range(K):
            i, _ = expert_of(down_index, div, rows, valid, slot, K, MD)
            own += tl.where(m == i[:, None], gate_of(gates, div, rows, valid, slot, K)[:, None], 0.0)
            named = named | (m == i[:, None])
            to = pre + row * (K * R) + slot * R + (column % RP)[None, :]
            of_slot = valid[:, None] & live[None, :] & ((column // RP)[None, :] == i[:, None])
            tl.store(to, narrow(wide, dtype), mask=of_slot)
        named = tl.reshape(tl.broadcast_to(named[:, :, None], [ROWS, MDP, RP]), [ROWS, MDP * RP])
        h = tl.where(named, weigh(activate(wide, ACTIVATION), own, RP, MDP, ROWS), 0.0)
    elif DOWN == "chosen":
        h = tl.zeros([ROWS, RP if WEIGHTS or UP == "one" else MUP * RP], tl.float32)
        for slot in tl.static_range(K):
            i, _ = expert_of(down_index, div, rows, valid, slot, K, MD)
            one = own_of(wide, i, RP, MDP, DOWN, ROWS)
            if down_bias is not None:
                one += bias_at(down_bias, i, k, k < R, valid, R, True)
            one = tl.where(wrong[:, None], 0.0, one)
            tl.store(pre + row * (K * R) + slot * R + k[None, :], narrow(one, dtype), mask=mask)
            gate = gate_of(gates, div, rows, valid, slot, K)[:, None]
            if WEIGHTS:
                h += one * gate
            else:
                one = activate(one, ACTIVATION) * gate
                if UP == "one":
                    h += one
                else:
                    j, _ = expert_of(up_index, div, rows, valid, slot, K, MU)
                    h += spread_to(one, j, RP, MUP, UP, ROWS)
        if WEIGHTS:
            h = activate(h, ACTIVATION)
    else:
        h = own_of(wide, 0, RP, MDP, DOWN, ROWS)
        if down_bias is not None:
            h += bias_at(down_bias, 0, k, k < R, valid, R, False)
        h = tl.where(wrong[:, None], 0.0, h)
        tl.store(pre + row * R + k[None, :], narrow(h, dtype), mask=mask)
        h = activate(h, ACTIVATION)
    if WEIGHTS or DOWN == "one":
        h = lift(h, gates, up_index, div, rows, valid, K, MU, RP, MUP, UP, not WEIGHTS, ROWS)
    elif UP == "one":
        h = spread_to(h, 0, RP, MUP, UP, ROWS)

    h = narrow(poison(h, wrong), dtype).to(DOT)
    weights = None
    if up_bias is not None:
        if UP != "one":
            weights = narrow(expert_gates(gates, up_index, div, rows, valid, K, MU, GP, UP), dtype).to(DOT)
        elif not WEIGHTS:
            weights = gate_sum(gates, div, rows, valid, K)
    columns, live = side_columns(up_weight, O * R, 1, R, RP, MU, MUP, UP)
    expand_side(
        h, columns, live, R, up_bias, weights, residual, tiles, out, rows, valid, up_index, div,
        O, K, MU, RP, MUP, GP, UP, PRECISION, ROWS, COLS, AHEAD, KEEP,
    )  # fmt: skip
