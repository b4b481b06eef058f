"""First launch of the backward: gradients of the pre-activation and of x.

Traffic: dy once from device memory (its second read, the residual's share of dx, finds it in L2), pre
once, dpre [N, r] and dx once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import activation_slope, narrow
from ..._routed_tiles import bank_columns, keep_own, poison, shrink, spread, tile_experts, tile_rows


@triton.jit
def _write_dx(
    g, columns, live, grad_out, dx, offsets, valid,
    H: tl.constexpr, RP: tl.constexpr, MDP: tl.constexpr, MASK_D: tl.constexpr, ADD_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx = g Wd[i] (+ dy) for a tile; returns where products were NaN, folded into [ROWS, COLS]."""
    spoilt = tl.zeros([ROWS, COLS], tl.int32)
    for start in range(0, H, COLS):
        c = start + tl.arange(0, COLS)
        inside = valid[:, None]
        w_mask = live[:, None]
        if H % COLS != 0:
            inside = inside & (c < H)[None, :]
            w_mask = w_mask & (c < H)[None, :]
        w_tile = tl.load(columns[:, None] + c[None, :], mask=w_mask, other=0.0).to(g.dtype)
        # Three TF32 products hold both halves of the tile in registers: too many beyond 128 columns.
        WIDE: tl.constexpr = "ieee" if PRECISION == "tf32x3" and MDP * RP > 128 else PRECISION
        d = tl.dot(g, w_tile, input_precision=WIDE)
        if MASK_D and MDP > 1:
            spoilt = tl.where(d == d, spoilt, 1)
        if ADD_GRAD:
            d += tl.load(grad_out + offsets + c[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + offsets + c[None, :], narrow(d, dx.dtype.element_ty), mask=inside)
    return spoilt


@triton.jit(do_not_specialize=["span", "down_div", "up_div"])
def adapter_input_grad_kernel(
    grad_out, pre, up_weight, down_weight, up_index, down_index, dpre, dx,
    perm, tile_start, tile_stop, span, down_div, up_div,
    H: tl.constexpr, O: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,  # noqa: E741
    MD: tl.constexpr, MDP: tl.constexpr, MASK_D: tl.constexpr,
    MU: tl.constexpr, MUP: tl.constexpr, MASK_U: tl.constexpr,
    ACTIVATION: tl.constexpr, ADD_GRAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dpre = act'(pre) * (dy Wu[j]) and dx = dpre Wd[i] (+ dy) for one tile of tokens."""
    dtype: tl.constexpr = pre.dtype.element_ty
    rows, valid, first = tile_rows(span, perm, tile_start, tile_stop, ROWS)
    i, wrong_down = tile_experts(down_index, down_div, rows, valid, first, perm, MD, MASK_D)
    j, wrong_up = tile_experts(up_index, up_div, rows, valid, first, perm, MU, MASK_U)
    wrong = wrong_down | wrong_up

    columns, live = bank_columns(up_weight, j, O * R, 1, R, RP, MU, MUP, MASK_U)
    wide = shrink(grad_out, rows, valid, columns, live, R, O, DOT, PRECISION, ROWS, COLS, MUP * RP)
    g = keep_own(wide, j, RP, MUP, MASK_U, ROWS)  # [ROWS, RP]
    k = tl.arange(0, RP)
    at = rows.to(tl.int64)[:, None] * R + k[None, :]
    mask = valid[:, None] & (k < R)[None, :]
    g *= activation_slope(tl.load(pre + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    # As in the forward: NaN in dx, nothing for the experts.
    g = tl.where(wrong[:, None], 0.0, g)
    if dpre is not None:
        tl.store(dpre + at, narrow(g, dtype), mask=mask)

    if dx is not None:
        g = narrow(spread(poison(g, wrong), i, RP, MDP, MASK_D, ROWS), dtype).to(DOT)
        columns, live = bank_columns(down_weight, i, R * H, H, R, RP, MD, MDP, MASK_D)
        offsets = rows.to(tl.int64)[:, None] * H
        spoilt = _write_dx(
            g, columns, live, grad_out, dx, offsets, valid, H, RP, MDP, MASK_D, ADD_GRAD, PRECISION, ROWS, COLS
        )
        if MASK_D and MDP > 1:  # noqa: SIM102
            if tl.max(tl.reshape(spoilt, [ROWS * COLS], can_reorder=True), 0) > 0:
                # An infinity in another expert's weights reached a row, as 0 * inf: one product for each expert,
                # 16 features a step, to keep the registers few.
                m = tl.arange(0, MDP * RP) // RP
                for own in range(MD):
                    _write_dx(
                        g, columns, live & (m == own), grad_out, dx, offsets, valid & (i == own),
                        H, RP, MDP, MASK_D, ADD_GRAD, PRECISION, ROWS, 16,
                    )  # fmt: skip
