"""Forward kernel: one launch from x to the output.

Traffic: x once from device memory (the residual's second read finds it in L2), the output once, and the
pre-activation [N, r]; 2NH + Nr elements against the floor of 2NH.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import activate, narrow
from ..._routed_tiles import bank_columns, bias_at, keep_own, poison, shrink, spread, tile_experts, tile_rows


@triton.jit
def _write_out(
    h, columns, live, j, up_bias, residual, out, offsets, valid,
    O: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, MUP: tl.constexpr, MASK_U: tl.constexpr,  # noqa: E741
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = residual + h Wu[j]^T + bu[j] for a tile; returns where products were NaN, folded into [ROWS, COLS]."""
    spoilt = tl.zeros([ROWS, COLS], tl.int32)
    for start in range(0, O, COLS):
        o = start + tl.arange(0, COLS)
        inside = o < O
        mask = valid[:, None]
        w_mask = live[:, None]
        if O % COLS != 0:
            mask = mask & inside[None, :]
            w_mask = w_mask & inside[None, :]
        w_tile = tl.load(columns[:, None] + o[None, :] * R, mask=w_mask, other=0.0).to(h.dtype)
        # Three TF32 products hold both halves of the tile in registers: too many beyond 128 columns.
        WIDE: tl.constexpr = "ieee" if PRECISION == "tf32x3" and MUP * RP > 128 else PRECISION
        y = tl.dot(h, w_tile, input_precision=WIDE)
        if MASK_U and MUP > 1:
            spoilt = tl.where(y == y, spoilt, 1)
        if up_bias is not None:
            y += bias_at(up_bias, j, o, inside, valid, O, MASK_U)
        if residual is not None:
            y += tl.load(residual + offsets + o[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + offsets + o[None, :], narrow(y, out.dtype.element_ty), mask=mask)
    return spoilt


@triton.jit(do_not_specialize=["span", "down_div", "up_div"])
def adapter_forward_kernel(
    x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual, out, pre,
    perm, tile_start, tile_stop, span, down_div, up_div,
    H: tl.constexpr, O: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,  # noqa: E741
    MD: tl.constexpr, MDP: tl.constexpr, MASK_D: tl.constexpr,
    MU: tl.constexpr, MUP: tl.constexpr, MASK_U: tl.constexpr,
    ACTIVATION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = residual + act(x Wd[i]^T + bd[i]) Wu[j]^T + bu[j] for one tile of tokens, and pre [ROWS, R]."""
    dtype: tl.constexpr = out.dtype.element_ty
    rows, valid, first = tile_rows(span, perm, tile_start, tile_stop, ROWS)
    i, wrong_down = tile_experts(down_index, down_div, rows, valid, first, perm, MD, MASK_D)
    j, wrong_up = tile_experts(up_index, up_div, rows, valid, first, perm, MU, MASK_U)
    wrong = wrong_down | wrong_up

    columns, live = bank_columns(down_weight, i, R * H, H, R, RP, MD, MDP, MASK_D)
    wide = shrink(x, rows, valid, columns, live, 1, H, DOT, PRECISION, ROWS, COLS, MDP * RP)
    h = keep_own(wide, i, RP, MDP, MASK_D, ROWS)  # [ROWS, RP]
    k = tl.arange(0, RP)
    if down_bias is not None:
        h += bias_at(down_bias, i, k, k < R, valid, R, MASK_D)
    # A row with a wrong id is NaN in the output; what is saved of it is 0, so that it teaches no expert.
    h = tl.where(wrong[:, None], 0.0, h)
    pre_at = pre + rows.to(tl.int64)[:, None] * R + k[None, :]
    tl.store(pre_at, narrow(h, dtype), mask=valid[:, None] & (k < R)[None, :])

    # Padded columns hold act(0) = 0.
    h = spread(poison(activate(h, ACTIVATION), wrong), j, RP, MUP, MASK_U, ROWS)
    h = narrow(h, dtype).to(DOT)
    columns, live = bank_columns(up_weight, j, O * R, 1, R, RP, MU, MUP, MASK_U)
    offsets = rows.to(tl.int64)[:, None] * O
    spoilt = _write_out(
        h, columns, live, j, up_bias, residual, out, offsets, valid, O, R, RP, MUP, MASK_U, PRECISION, ROWS, COLS
    )
    if MASK_U and MUP > 1:  # noqa: SIM102
        if tl.max(tl.reshape(spoilt, [ROWS * COLS], can_reorder=True), 0) > 0:
            # An infinity in another expert's weights reached a row, as 0 * inf: one product for each expert,
            # 16 features a step, to keep the registers few.
            m = tl.arange(0, MUP * RP) // RP
            for own in range(MU):
                _write_out(
                    h, columns, live & (m == own), j, up_bias, residual, out, offsets, valid & (j == own),
                    O, R, RP, MUP, MASK_U, PRECISION, ROWS, 16,
                )  # fmt: skip
