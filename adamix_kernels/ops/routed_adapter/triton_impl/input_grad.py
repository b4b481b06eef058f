"""First launch of the backward: gradients of the pre-activation and of x, and the activation for the second launch.

Traffic: dy and dx once, pre, dpre and h [N, r]. Where dx holds dy too and a tile of it fits in registers (KEEP), it
stays there; else its second read is one more, which L2 serves in part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import activate, activation_slope, narrow
from ..._routed_tiles import (
    all_tiles,
    bank_columns,
    expand,
    keep_own,
    poison,
    shrink,
    shrink_tiles,
    spread,
    tile_experts,
    tile_rows,
)


@triton.jit
def _activations(pre, h, at, mask, ACTIVATION: tl.constexpr):
    """act'(pre) of a tile, float32; h, unless None, gets act(pre)."""
    z = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
    if h is not None:
        tl.store(h + at, narrow(activate(z, ACTIVATION), h.dtype.element_ty), mask=mask)
    return activation_slope(z, ACTIVATION)


@triton.jit(do_not_specialize=["span", "down_div", "up_div"])
def adapter_input_grad_kernel(
    grad_out, pre, up_weight, down_weight, up_index, down_index, dpre, h, dx,
    perm, tile_start, tile_stop, span, down_div, up_div,
    H: tl.constexpr, O: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,  # noqa: E741
    MD: tl.constexpr, MDP: tl.constexpr, MASK_D: tl.constexpr,
    MU: tl.constexpr, MUP: tl.constexpr, MASK_U: tl.constexpr,
    ACTIVATION: tl.constexpr, ADD_GRAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, AHEAD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """dpre = act'(pre) * (dy Wu[j]), h = act(pre) and dx = dpre Wd[i] (+ dy) for one tile of tokens.

    dpre, h and dx may be None. KEEP: dx is wanted, and dy is added to it.
    """
    dtype: tl.constexpr = pre.dtype.element_ty
    rows, valid, first = tile_rows(span, perm, tile_start, tile_stop, ROWS)
    tiles = 0
    if KEEP:
        tiles = all_tiles(grad_out, rows, valid, O, COLS)
    k = tl.arange(0, RP)
    at = rows.to(tl.int64)[:, None] * R + k[None, :]
    mask = valid[:, None] & (k < R)[None, :]
    if not KEEP:
        slope = _activations(pre, h, at, mask, ACTIVATION)
    i, wrong_down = tile_experts(down_index, down_div, rows, valid, first, perm, MD, MASK_D)
    j, wrong_up = tile_experts(up_index, up_div, rows, valid, first, perm, MU, MASK_U)
    wrong = wrong_down | wrong_up

    columns, live = bank_columns(up_weight, j, O * R, 1, R, RP, MU, MUP, MASK_U)
    if KEEP:
        wide = shrink_tiles(tiles, columns, live, R, O, DOT, ROWS, COLS, MUP * RP, AHEAD)
    else:
        wide = shrink(grad_out, rows, valid, columns, live, R, O, DOT, PRECISION, ROWS, COLS, MUP * RP)
    # Beside rows that stay on the chip there are no registers for it before.
    if KEEP:
        slope = _activations(pre, h, at, mask, ACTIVATION)
    # As in the forward: NaN in dx, nothing for the experts.
    g = tl.where(wrong[:, None], 0.0, keep_own(wide, j, RP, MUP, MASK_U, ROWS) * slope)  # [ROWS, RP]
    if dpre is not None:
        tl.store(dpre + at, narrow(g, dtype), mask=mask)

    if dx is not None:
        g = narrow(spread(poison(g, wrong), i, RP, MDP, MASK_D, ROWS), dtype).to(DOT)
        columns, live = bank_columns(down_weight, i, R * H, H, R, RP, MD, MDP, MASK_D)
        expand(
            g, i, columns, live, 1, None, grad_out if ADD_GRAD else None, tiles, dx, rows, valid,
            H, MD, RP, MDP, MASK_D, PRECISION, ROWS, COLS, AHEAD, KEEP,
        )  # fmt: skip
