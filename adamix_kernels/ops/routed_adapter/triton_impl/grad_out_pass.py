"""First launch of the backward of many rows whose up side is one expert's: dy is read once for dpre, dx and dWu.

A program walks consecutive tiles of tokens. Its warps share out the features, so that each holds its columns of dWu in
registers from the first tile to the last and leaves them in a float32 plane of the program's own.
Traffic: dy and dx once, pre and dpre [N, r], and a plane [H, r] a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import activate, activation_slope, narrow
from ..._routed_tiles import poison, sum_of_warps, tile_experts


@triton.jit(do_not_specialize=["batch", "span", "down_div", "up_div", "share"])
def adapter_grad_out_pass_kernel(
    grad_out, pre, up_weight, down_weight, up_index, down_index, dpre, dx, up_plane, up_bias_plane,
    batch, span, down_div, up_div, share,
    H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, MD: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD_GRAD: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
    ABREAST: tl.constexpr,
):  # fmt: skip
    """dpre = act'(pre) * (dy Wu), dx = dpre Wd[i] (+ dy); planes of dWu = dy^T act(pre) and of dbu, the sum of dy.

    dpre, dx and the planes [programs, H, R], [programs, H] may be None. share: tiles of ROWS tokens of a program.
    PARTS * COLS: H padded. ABREAST: rows that a program's threads hold side by side, whose sums stay apart until the
    end.
    """
    dtype: tl.constexpr = pre.dtype.element_ty
    c = tl.arange(0, PARTS)[:, None, None] * COLS + tl.arange(0, COLS)[None, None, :]  # [PARTS, 1, COLS]
    k = tl.arange(0, RP)
    n = tl.arange(0, ROWS)
    flat = tl.arange(0, ROWS * RP)
    w_mask = (k < R)[None, :, None] & (c < H)
    up = tl.load(
        up_weight + tl.permute(c, (0, 2, 1)) * R + k[None, None, :], mask=tl.permute(w_mask, (0, 2, 1)), other=0.0
    )
    acc = tl.zeros([PARTS, RP, COLS], tl.float32)
    sums = tl.zeros([PARTS, ABREAST, COLS], tl.float32)
    tiles = tl.cdiv(span, ROWS)
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, batch * tiles)
    for b in range(begin // tiles, tl.cdiv(end, tiles)):
        i, wrong_down = tile_experts(down_index, down_div, b * span + n, n < span, b * span, None, MD, False)
        down = tl.load(down_weight + i * (R * H) + k[None, :, None] * H + c, mask=w_mask, other=0.0)
        for tile in range(tl.maximum(begin, b * tiles), tl.minimum(end, b * tiles + tiles)):
            offset0 = (tile - b * tiles) * ROWS
            offset = offset0 + n
            rows = b * span + offset
            valid = offset < span
            _, wrong_up = tile_experts(up_index, up_div, rows, valid, b * span, None, 1, False)
            if MD == 1:
                _, wrong_down = tile_experts(down_index, down_div, rows, valid, b * span, None, 1, False)
            wrong = wrong_down | wrong_up
            long = rows.to(tl.int64)
            mask = valid[None, :, None]
            if H < PARTS * COLS:
                mask = mask & (c < H)
            dy = tl.load(grad_out + long[None, :, None] * H + c, mask=mask, other=0.0)
            at = long[:, None] * R + k[None, :]
            at_mask = valid[:, None] & (k < R)[None, :]
            # One for each thread. The sums, of one term, keep them there: else every warp would compute them all.
            z_row = offset0 + flat // RP
            z = tl.load(
                pre + (b * span + z_row).to(tl.int64) * R + flat % RP, mask=(z_row < span) & (flat % RP < R), other=0.0
            ).to(tl.float32)
            slope = tl.reshape(tl.sum(activation_slope(z, ACTIVATION)[:, None], axis=1), [ROWS, RP])
            g = sum_of_warps(tl.dot(dy.to(DOT), up.to(DOT)), PARTS, ROWS, RP) * slope
            # As in the forward: NaN in dx, nothing for the experts.
            g = tl.where(wrong[:, None], 0.0, g)
            if dpre is not None:
                tl.store(dpre + at, narrow(g, dtype), mask=at_mask)
            if up_plane is not None:
                h = tl.sum(activate(z, ACTIVATION)[:, None], axis=1)
                h = tl.trans(tl.reshape(narrow(h, dtype).to(DOT), [ROWS, RP]))
                acc = tl.dot(tl.broadcast_to(h[None, :, :], [PARTS, RP, ROWS]), dy.to(DOT), acc)
                own = dy.to(tl.float32)
                if up_index is not None:
                    own = tl.where(wrong_up[None, :, None], 0.0, own)
                sums += tl.sum(tl.reshape(own, [PARTS, ROWS // ABREAST, ABREAST, COLS]), axis=1)
            if dx is not None:
                g = narrow(poison(g, wrong), dtype).to(DOT)
                g = tl.broadcast_to(g[None, :, :], [PARTS, ROWS, RP])
                if ADD_GRAD:
                    y = tl.dot(g, down.to(DOT), dy.to(tl.float32))
                else:
                    y = tl.dot(g, down.to(DOT))
                tl.store(dx + long[None, :, None] * H + c, narrow(y, dtype), mask=mask)

    if up_plane is not None:
        plane = tl.program_id(0).to(tl.int64) * H
        tl.store(up_plane + plane * R + c * R + k[None, :, None], acc, mask=w_mask)
        c2 = tl.arange(0, PARTS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        tl.store(up_bias_plane + plane + c2, tl.sum(sums, axis=1), mask=c2 < H)
