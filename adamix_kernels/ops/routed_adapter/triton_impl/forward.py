"""Forward kernel: one launch from x to the output.

Traffic: x and the output once, and the pre-activation [N, r]; 2NH + Nr elements against the floor of 2NH. Where the
residual is x and a tile of it fits in registers (KEEP), it stays there; else the residual's read is one more, which
L2 serves in part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import activate, narrow
from ..._routed_tiles import (
    all_tiles,
    bank_columns,
    bias_at,
    expand,
    keep_own,
    poison,
    shrink,
    shrink_tiles,
    spread,
    tile_experts,
    tile_rows,
)


@triton.jit(do_not_specialize=["span", "down_div", "up_div"])
def adapter_forward_kernel(
    x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual, out, pre,
    perm, tile_start, tile_stop, span, down_div, up_div,
    H: tl.constexpr, O: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,  # noqa: E741
    MD: tl.constexpr, MDP: tl.constexpr, MASK_D: tl.constexpr,
    MU: tl.constexpr, MUP: tl.constexpr, MASK_U: tl.constexpr,
    ACTIVATION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, AHEAD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """out = residual + act(x Wd[i]^T + bd[i]) Wu[j]^T + bu[j] for one tile of tokens, and pre [ROWS, R].

    KEEP: residual is x.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    rows, valid, first = tile_rows(span, perm, tile_start, tile_stop, ROWS)
    tiles = 0
    if KEEP:
        tiles = all_tiles(x, rows, valid, H, COLS)
    i, wrong_down = tile_experts(down_index, down_div, rows, valid, first, perm, MD, MASK_D)
    j, wrong_up = tile_experts(up_index, up_div, rows, valid, first, perm, MU, MASK_U)
    wrong = wrong_down | wrong_up

    columns, live = bank_columns(down_weight, i, R * H, H, R, RP, MD, MDP, MASK_D)
    if KEEP:
        wide = shrink_tiles(tiles, columns, live, 1, H, DOT, ROWS, COLS, MDP * RP, AHEAD)
    else:
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
    expand(
        h, j, columns, live, R, up_bias, residual, tiles, out, rows, valid,
        O, MU, RP, MUP, MASK_U, PRECISION, ROWS, COLS, AHEAD, KEEP,
    )  # fmt: skip
