"""First launch of the backward of many rows whose B is one expert's: dy is read once for dt, dx and dB.

A program walks consecutive tiles of tokens. Its warps share out the features, so that each holds its columns of dB in
registers from the first tile to the last and leaves them in a float32 plane of the program's own.
Traffic: dy and dx once, t and dt [N, r], and a plane [Ng, r] a program.
"""

import triton
import triton.language as tl

from ...._triton_utils import INTERPRETING, narrow
from ..._routed_tiles import poison, sum_of_warps, tile_experts
from .tiles import _DROP_PAIR, row_keys

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def _drop(z, h, bound):
    """drop_tile of tiles.py for z of three axes and its hashes h, uint32: zero where they are below the bound."""
    if _INTERPRETING or z.dtype == tl.float32:
        return tl.where(h >= bound, z, 0.0).to(z.dtype)
    else:
        bound = tl.full(h.shape, 0, tl.uint32) + bound
        return tl.inline_asm_elementwise(_DROP_PAIR, "=r,r,r,r,r,r", [z, h, bound], dtype=z.dtype, is_pure=True, pack=2)


@triton.jit(do_not_specialize=["batch", "span", "a_divisor", "b_divisor", "threshold", "share"])
def lora_grad_out_pass_kernel(
    grad_ptr, t_ptr, a_ptr, b_ptr, a_index_ptr, b_index_ptr, seed_ptr, dx_ptr, dt_ptr, keys_ptr, plane_ptr,
    batch, span, a_divisor, b_divisor, threshold, inv_keep, scaling, share,
    K: tl.constexpr, NG: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, A_EXPERTS: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr, A_COLS: tl.constexpr, B_COLS: tl.constexpr,
):  # fmt: skip
    """dt = scaling * dy B; dx = keep / (1 - p) * (dt A[i]); keys: row_keys [N, 2]; planes [programs, NG, R] of dB.

    dx, dt, keys and the planes may be None. share: tiles of BLOCK_M tokens of a program. PARTS * A_COLS: K padded,
    PARTS * B_COLS: NG padded.
    """
    dtype: tl.constexpr = t_ptr.dtype.element_ty
    part = tl.arange(0, PARTS)[:, None, None]
    a_cols = part * A_COLS + tl.arange(0, A_COLS)[None, None, :]  # [PARTS, 1, A_COLS]
    b_cols = part * B_COLS + tl.arange(0, B_COLS)[None, None, :]
    k = tl.arange(0, RP)
    n = tl.arange(0, BLOCK_M)
    a_mask = (k < R)[None, :, None] & (a_cols < K)
    b_mask = (k < R)[None, :, None] & (b_cols < NG)
    b = tl.load(
        b_ptr + tl.permute(b_cols, (0, 2, 1)) * R + k[None, None, :], mask=tl.permute(b_mask, (0, 2, 1)), other=0.0
    )
    acc = tl.zeros([PARTS, RP, B_COLS], tl.float32)
    tiles = tl.cdiv(span, BLOCK_M)
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, batch * tiles)
    for sample in range(begin // tiles, tl.cdiv(end, tiles)):
        top = sample * span
        i, wrong_a = tile_experts(a_index_ptr, a_divisor, top + n, n < span, top, None, A_EXPERTS, False)
        a = tl.load(a_ptr + i * (R * K) + k[None, :, None] * K + a_cols, mask=a_mask, other=0.0)
        for tile in range(tl.maximum(begin, sample * tiles), tl.minimum(end, sample * tiles + tiles)):
            offset = (tile - sample * tiles) * BLOCK_M + n
            rows = top + offset
            valid = offset < span
            _, wrong = tile_experts(b_index_ptr, b_divisor, rows, valid, top, None, 1, False)
            if A_EXPERTS == 1:
                _, wrong_a = tile_experts(a_index_ptr, a_divisor, rows, valid, top, None, 1, False)
            long = rows.to(tl.int64)
            mask = valid[None, :, None]
            if NG < PARTS * B_COLS:
                mask = mask & (b_cols < NG)
            dy = tl.load(grad_ptr + long[None, :, None] * NG + b_cols, mask=mask, other=0.0)
            at = long[:, None] * R + k[None, :]
            at_mask = valid[:, None] & (k < R)[None, :]
            # As in the forward: NaN in dx, nothing for the experts.
            dt = sum_of_warps(tl.dot(dy.to(DOT), b.to(DOT)), PARTS, BLOCK_M, RP) * scaling
            dt = narrow(tl.where(wrong[:, None], 0.0, dt), dtype)
            if dt_ptr is not None:
                tl.store(dt_ptr + at, dt, mask=at_mask)
            if plane_ptr is not None:
                t = tl.trans(tl.load(t_ptr + at, mask=at_mask, other=0.0).to(DOT))
                acc = tl.dot(tl.broadcast_to(t[None, :, :], [PARTS, RP, BLOCK_M]), dy.to(DOT), acc)
            if seed_ptr is not None:
                key0, key1 = row_keys(seed_ptr, rows)
                if keys_ptr is not None:
                    tl.store(keys_ptr + long * 2, key0.to(tl.int32, bitcast=True), mask=valid)
                    tl.store(keys_ptr + long * 2 + 1, key1.to(tl.int32, bitcast=True), mask=valid)
            if dx_ptr is not None:
                wrong = wrong | wrong_a
                dt = tl.broadcast_to(poison(dt.to(DOT), wrong)[None, :, :], [PARTS, BLOCK_M, RP])
                y = tl.dot(dt, a.to(DOT))
                if seed_ptr is not None:
                    y *= inv_keep
                y = narrow(y, dtype)
                if seed_ptr is not None:
                    # A wrong row's NaN is kept everywhere.
                    bound = tl.where(wrong, -2147483648, threshold).to(tl.uint32, bitcast=True) ^ 0x80000000
                    c = a_cols.to(tl.uint32) * 0x9E3779B9
                    y = _drop(y, key0[None, :, None] * (c ^ (c * c | 1)) + key1[None, :, None], bound[None, :, None])
                mask = valid[None, :, None]
                if K < PARTS * A_COLS:
                    mask = mask & (a_cols < K)
                tl.store(dx_ptr + long[None, :, None] * K + a_cols, y, mask=mask)

    if plane_ptr is not None:
        to = plane_ptr + tl.program_id(0).to(tl.int64) * (NG * R) + b_cols * R + k[None, :, None]
        tl.store(to, acc * scaling, mask=b_mask)
