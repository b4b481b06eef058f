"""Kernels of the frozen linear layer with routed LoRA: the rank's columns ride in the layer's own K loop."""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .tiles import drop_tile, keep_tile, row_experts, row_keys, shrink, tile_rows


@triton.jit
def _tile_of(num_rows, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """(row tile, column tile): eight row tiles share a column tile's weights while they are in L2."""
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    column_tiles: tl.constexpr = (COLS + BLOCK_C - 1) // BLOCK_C
    band = tl.program_id(0) // (8 * column_tiles)
    height = tl.minimum(row_tiles - band * 8, 8)
    inside = tl.program_id(0) % (8 * column_tiles)
    return band * 8 + inside % height, inside // height


@triton.jit
def _b_offsets(k, columns, OFFSETS: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr):
    """Where B keeps (packed rank k [1, R] or [R, 1], output column [C, 1] or [1, C]), and whether it does."""
    offset = tl.zeros_like(k)
    for g in tl.static_range(len(OFFSETS)):
        offset = tl.where(k // RANK == g, OFFSETS[g], offset)
    inside = columns - offset
    at = (k // RANK * NG + inside) * RANK + k % RANK
    return at, (k < len(OFFSETS) * RANK) & (inside >= 0) & (inside < NG)


@triton.jit
def _delta(
    t, bank_ptr, at, ok, ids, low, high, EXPERTS: tl.constexpr, EXPERT_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """t [BLOCK_M, BLOCK_R] times each row's expert's [BLOCK_R, BLOCK_C] tile of the bank."""
    delta = tl.zeros([t.shape[0], at.shape[1]], tl.float32)
    if EXPERTS == 1:
        bank = tl.load(bank_ptr + at, mask=ok, other=0.0)
        delta = tl.dot(t.to(DOT), bank.to(DOT), delta, input_precision=PRECISION)
    else:
        for m in range(low, high + 1):
            mine = ids == m
            if tl.max(mine.to(tl.int32), 0) > 0:
                bank = tl.load(bank_ptr + tl.cast(m, tl.int64) * EXPERT_STRIDE + at, mask=ok, other=0.0)
                part = tl.dot(t.to(DOT), bank.to(DOT), input_precision=PRECISION)
                delta = tl.where(mine[:, None], part, delta)
    return delta


@triton.jit(do_not_specialize=["num_rows", "a_divisor", "b_divisor", "threshold"])
def frozen_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, a_ptr, b_ptr, a_index_ptr, b_index_ptr, seed_ptr, out_ptr, t_ptr,
    num_rows, a_divisor, b_divisor, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr, OFFSETS: tl.constexpr,
    A_EXPERTS: tl.constexpr, B_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out = x W^T + bias + scaling * (dropout(x) A[i]^T) B[j]^T, one tile a program."""
    R: tl.constexpr = len(OFFSETS) * RANK
    DROPOUT: tl.constexpr = seed_ptr is not None
    row_tile, column_tile = _tile_of(num_rows, WIDTH, BLOCK_M, BLOCK_N)
    rows, exists = tile_rows(row_tile, None, num_rows, BLOCK_M)
    long = rows.to(tl.int64)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    key0 = 0
    key1 = 0
    if DROPOUT:
        key0, key1 = row_keys(seed_ptr, rows)
    ids = rows
    low = 0
    high = 0
    if A_EXPERTS > 1:
        ids, low, high = row_experts(a_index_ptr, rows, exists, a_divisor, A_EXPERTS)
    a_ptrs = a_ptr + tl.cast(low, tl.int64) * (R * K) + r * K

    x_ptrs = x_ptr + long * K
    w_ptrs = weight_ptr + n.to(tl.int64) * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    t = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptrs[:, None] + k[None, :], mask=exists[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptrs[None, :] + k[:, None], mask=(n < WIDTH)[None, :] & (k < K)[:, None], other=0.0)
        a = tl.load(a_ptrs[None, :] + k[:, None], mask=(r < R)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(x.to(DOT), w.to(DOT), acc, input_precision=PRECISION)
        if DROPOUT:
            x = drop_tile(x, key0, key1, k, threshold, inv_keep, DOT)
        t = tl.dot(x.to(DOT), a.to(DOT), t, input_precision=PRECISION)
    if A_EXPERTS > 1:
        # The loop served the tile's lowest expert; the others take passes of their own.
        t = tl.where((ids == low)[:, None], t, 0.0)
        t = shrink(
            t, x_ptrs, exists, ids, low + 1, high, key0, key1, threshold, inv_keep, a_ptr,
            A_EXPERTS, R * K, 0, 0, 0, R, K, 1, K, 0, DROPOUT, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION, DOT,
        )  # fmt: skip
    t = narrow(t, t_ptr.dtype.element_ty)
    if column_tile == 0:
        tl.store((t_ptr + long * R)[:, None] + r[None, :], t, mask=exists[:, None] & (r < R)[None, :])

    if B_EXPERTS > 1:
        ids, low, high = row_experts(b_index_ptr, rows, exists, b_divisor, B_EXPERTS)
    at, ok = _b_offsets(r[:, None], n[None, :], OFFSETS, RANK, NG)
    acc += scaling * _delta(t, b_ptr, at, ok, ids, low, high, B_EXPERTS, R * NG, PRECISION, DOT)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
    out_ptrs = (out_ptr + long * WIDTH)[:, None] + n[None, :]
    tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=exists[:, None] & (n < WIDTH)[None, :])


@triton.jit(do_not_specialize=["num_rows", "a_divisor", "b_divisor", "threshold"])
def frozen_dx_kernel(
    grad_ptr, weight_ptr, a_ptr, b_ptr, a_index_ptr, b_index_ptr, seed_ptr, dx_ptr, dt_ptr,
    num_rows, a_divisor, b_divisor, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr, OFFSETS: tl.constexpr,
    A_EXPERTS: tl.constexpr, B_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dt = scaling * dy B[j]; dx = dy W + keep / (1 - p) * (dt A[i]): the loop runs over dy's columns."""
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    row_tile, column_tile = _tile_of(num_rows, K, BLOCK_M, BLOCK_N)
    rows, exists = tile_rows(row_tile, None, num_rows, BLOCK_M)
    long = rows.to(tl.int64)
    k = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    ids = rows
    low = 0
    high = 0
    if B_EXPERTS > 1:
        ids, low, high = row_experts(b_index_ptr, rows, exists, b_divisor, B_EXPERTS)
    b_ptrs = b_ptr + tl.cast(low, tl.int64) * (R * NG)

    grad_ptrs = grad_ptr + long * WIDTH
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dt = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n0 in range(0, WIDTH, BLOCK_K):
        n = n0 + tl.arange(0, BLOCK_K)
        grad = tl.load(grad_ptrs[:, None] + n[None, :], mask=exists[:, None] & (n < WIDTH)[None, :], other=0.0)
        w_ptrs = (weight_ptr + n.to(tl.int64) * K)[:, None] + k[None, :]
        w = tl.load(w_ptrs, mask=(n < WIDTH)[:, None] & (k < K)[None, :], other=0.0)
        at, ok = _b_offsets(r[None, :], n[:, None], OFFSETS, RANK, NG)
        b = tl.load(b_ptrs + at, mask=ok, other=0.0)
        acc = tl.dot(grad.to(DOT), w.to(DOT), acc, input_precision=PRECISION)
        dt = tl.dot(grad.to(DOT), b.to(DOT), dt, input_precision=PRECISION)
    if B_EXPERTS > 1:
        # The loop served the tile's lowest expert; the others take passes of their own.
        dt = tl.where((ids == low)[:, None], dt, 0.0)
        for g in tl.static_range(GROUPS):
            dt = shrink(
                dt, grad_ptrs + OFFSETS[g], exists, ids, low + 1, high, 0, 0, 0, 1.0, b_ptr,
                B_EXPERTS, R * NG, g * NG * RANK - g * RANK, 0, g * RANK, (g + 1) * RANK, 1, RANK, NG, 0, False,
                BLOCK_M, BLOCK_K, BLOCK_R, PRECISION, DOT,
            )  # fmt: skip
    dt = narrow(dt * scaling, dt_ptr.dtype.element_ty)
    if column_tile == 0:
        tl.store((dt_ptr + long * R)[:, None] + r[None, :], dt, mask=exists[:, None] & (r < R)[None, :])

    if A_EXPERTS > 1:
        ids, low, high = row_experts(a_index_ptr, rows, exists, a_divisor, A_EXPERTS)
    at = r[:, None] * K + k[None, :]
    ok = (r < R)[:, None] & (k < K)[None, :]
    delta = inv_keep * _delta(dt, a_ptr, at, ok, ids, low, high, A_EXPERTS, R * K, PRECISION, DOT)
    if seed_ptr is not None:
        key0, key1 = row_keys(seed_ptr, rows)
        delta = tl.where(keep_tile(key0, key1, k, threshold), delta, 0.0)
    dx_ptrs = (dx_ptr + long * K)[:, None] + k[None, :]
    tl.store(dx_ptrs, narrow(acc + delta, dx_ptr.dtype.element_ty), mask=exists[:, None] & (k < K)[None, :])
