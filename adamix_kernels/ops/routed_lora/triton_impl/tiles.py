"""Device functions of the routed LoRA kernels: the dropout mask, a tile of rows through A and through B.

A tile is [BLOCK_M] token rows. A bank's expert is a matrix of `rank` rows and `cols` columns at
BASE + k * K_STRIDE + c * C_STRIDE, k in [K_LO, K_HI): A as it lies, or one group of B with the tile's packed
rank index k = g * r + j.
"""

import triton
import triton.language as tl

from ...._triton_utils import narrow


@triton.jit
def _fmix32(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def row_keys(seed_ptr, rows):
    """key0 | 1, key1 of ops/_dropout.py: uint32 [BLOCK_M] for int32 rows [BLOCK_M], whose high half is zero."""
    seed = tl.load(seed_ptr)
    lo = seed.to(tl.uint32)
    hi = (seed >> 32).to(tl.uint32)
    row = rows.to(tl.uint32)
    a = _fmix32(_fmix32(lo + 0x9E3779B9) ^ hi)
    b = _fmix32(_fmix32(hi + 0x7F4A7C15) ^ lo)
    key0 = _fmix32(_fmix32(a ^ row)) | 1
    key1 = _fmix32(_fmix32(b + row))
    return key0, key1


@triton.jit
def keep_tile(key0, key1, cols, threshold):
    """keep_mask of ops/_dropout.py for rows' keys and columns: bool [BLOCK_M, BLOCK_C].

    threshold: its signed bound, one or [BLOCK_M, 1].
    """
    t = cols.to(tl.uint32) * 0x9E3779B9
    h = key0[:, None] * (t ^ (t * t | 1))[None, :] + key1[:, None]
    return (h ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def tile_rows(pid, perm_ptr, num_rows, BLOCK_M: tl.constexpr):
    """Row numbers [BLOCK_M] int32 of a tile, in the order of perm when there is one, and which of them exist."""
    rows = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < num_rows
    if perm_ptr is not None:
        rows = tl.load(perm_ptr + rows, mask=exists, other=0).to(tl.int32)
    return rows, exists


@triton.jit
def row_experts(index_ptr, rows, exists, divisor, EXPERTS: tl.constexpr):
    """Expert of each row [BLOCK_M] int32, index[row // divisor], -1 where there is no row; lowest, highest of the tile;
    which rows' ids are outside the bank: their expert is the nearest.
    """
    raw = tl.load(index_ptr + rows // divisor, mask=exists, other=0)
    wrong = (raw < 0) | (raw >= EXPERTS)
    ids = tl.minimum(tl.maximum(raw, 0), EXPERTS - 1).to(tl.int32)
    low = tl.min(tl.where(exists, ids, EXPERTS), 0)
    ids = tl.where(exists, ids, -1)
    return ids, low, tl.max(ids, 0), wrong


@triton.jit
def poison(values, wrong):
    """values in float32, NaN in the rows [BLOCK_M, :] that a wrong id routes."""
    return tl.where(wrong[:, None], float("nan"), values.to(tl.float32))


@triton.jit
def _reduce_columns(
    acc, x_ptrs, rows_ok, key0, key1, threshold, bank_ptrs, bank_ok,
    COLS: tl.constexpr, C_STRIDE: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, W] += x [BLOCK_M, COLS] @ bank^T [COLS, W]."""
    for c0 in range(0, COLS, BLOCK_C):
        cols = c0 + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptrs[:, None] + cols[None, :], mask=rows_ok[:, None] & (cols < COLS)[None, :], other=0.0)
        bank = tl.load(
            bank_ptrs[None, :] + cols[:, None] * C_STRIDE, mask=bank_ok[None, :] & (cols < COLS)[:, None], other=0.0
        )
        if DROPOUT:
            x = tl.where(keep_tile(key0, key1, cols, threshold), x.to(DOT), 0.0)
        acc = tl.dot(x.to(DOT), bank.to(DOT), acc, input_precision=PRECISION)
    return acc


@triton.jit
def shrink(
    acc, x_ptrs, exists, ids, low, high, key0, key1, threshold, bank_ptr,
    EXPERTS: tl.constexpr, EXPERT_STRIDE: tl.constexpr, BASE: tl.constexpr, K0: tl.constexpr, K_LO: tl.constexpr,
    K_HI: tl.constexpr, K_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_R] += x @ (bank of the row's expert)^T, rank rows K0 : K0 + BLOCK_R.

    One expert: one product. WIDE (experts padded to a power of two): every expert's product at once, each row
    keeps its own. Otherwise one masked pass for each expert that occurs in the tile.
    """
    k = K0 + tl.arange(0, BLOCK_R)
    k_ok = (k >= K_LO) & (k < K_HI)
    if EXPERTS == 1:
        acc = _reduce_columns(
            acc, x_ptrs, exists, key0, key1, threshold, bank_ptr + BASE + k * K_STRIDE, k_ok,
            COLS, C_STRIDE, DROPOUT, BLOCK_C, PRECISION, DOT,
        )  # fmt: skip
    elif WIDE > 0:
        w = tl.arange(0, WIDE * BLOCK_R)
        expert = w // BLOCK_R
        wk = K0 + w % BLOCK_R
        part = _reduce_columns(
            tl.zeros([BLOCK_M, WIDE * BLOCK_R], tl.float32), x_ptrs, exists, key0, key1, threshold,
            bank_ptr + BASE + expert * EXPERT_STRIDE + wk * K_STRIDE, (expert < EXPERTS) & (wk >= K_LO) & (wk < K_HI),
            COLS, C_STRIDE, DROPOUT, BLOCK_C, PRECISION, DOT,
        )  # fmt: skip
        part = tl.reshape(part, [BLOCK_M, WIDE, BLOCK_R])
        own = tl.arange(0, WIDE)[None, :, None] == ids[:, None, None]
        acc += tl.sum(tl.where(own, part, 0.0), axis=1)
    else:
        for m in range(low, high + 1):
            mine = ids == m
            if tl.max(mine.to(tl.int32), 0) > 0:
                part = _reduce_columns(
                    tl.zeros([BLOCK_M, BLOCK_R], tl.float32), x_ptrs, mine, key0, key1, threshold,
                    bank_ptr + tl.cast(m, tl.int64) * EXPERT_STRIDE + BASE + k * K_STRIDE, k_ok,
                    COLS, C_STRIDE, DROPOUT, BLOCK_C, PRECISION, DOT,
                )  # fmt: skip
                acc += tl.where(mine[:, None], part, 0.0)
    return acc


@triton.jit
def _expand_rows(
    t, t_ptrs, rows_ok, wrong, bank_ptr, base_ptrs, out_ptrs, key0, key1, threshold, scale, first, step,
    BASE: tl.constexpr, K_LO: tl.constexpr, K_HI: tl.constexpr, K_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr,
    COLS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out [rows, COLS] = base + scale * t @ bank, with the dropout mask where DROPOUT, columns first : COLS : step."""
    if DROPOUT:
        # A wrong row's NaN is kept everywhere.
        threshold = tl.where(wrong, -2147483648, threshold)[:, None]
    for c0 in range(first, COLS, step):
        cols = c0 + tl.arange(0, BLOCK_C)
        ok = rows_ok[:, None] & (cols < COLS)[None, :]
        if base_ptrs is not None:
            base = tl.load(base_ptrs[:, None] + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            if chunk * BLOCK_R < K_HI and (chunk + 1) * BLOCK_R > K_LO:
                k = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
                k_ok = (k >= K_LO) & (k < K_HI)
                bank = tl.load(
                    bank_ptr + BASE + k[:, None] * K_STRIDE + cols[None, :] * C_STRIDE,
                    mask=k_ok[:, None] & (cols < COLS)[None, :], other=0.0,
                )  # fmt: skip
                part = t
                if CHUNKS > 1:
                    part = tl.load(t_ptrs[:, None] + k[None, :], mask=rows_ok[:, None] & k_ok[None, :], other=0.0)
                    part = poison(part, wrong)
                acc = tl.dot(part.to(DOT), bank.to(DOT), acc, input_precision=PRECISION)
        acc *= scale
        if DROPOUT:
            acc = tl.where(keep_tile(key0, key1, cols, threshold), acc, 0.0)
        if base_ptrs is not None:
            acc += base
        tl.store(out_ptrs[:, None] + cols[None, :], narrow(acc, out_ptrs.dtype.element_ty), mask=ok)


@triton.jit
def expand(
    t, t_ptrs, exists, wrong, ids, low, high, bank_ptr, base_ptrs, out_ptrs, key0, key1, threshold, scale, first, step,
    EXPERTS: tl.constexpr, EXPERT_STRIDE: tl.constexpr, BASE: tl.constexpr, K_LO: tl.constexpr, K_HI: tl.constexpr,
    K_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr, COLS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Every row of the tile through its expert: a pass reads and writes only the rows of one expert.

    Rows that are wrong become NaN; what is stored of them at t_ptrs is 0.
    """
    t = poison(t, wrong)
    if EXPERTS == 1:
        _expand_rows(
            t, t_ptrs, exists, wrong, bank_ptr, base_ptrs, out_ptrs, key0, key1, threshold, scale, first, step,
            BASE, K_LO, K_HI, K_STRIDE, C_STRIDE, COLS, DROPOUT, BLOCK_M, BLOCK_C, BLOCK_R, CHUNKS, PRECISION, DOT,
        )  # fmt: skip
    else:
        for m in range(low, high + 1):
            mine = ids == m
            if tl.max(mine.to(tl.int32), 0) > 0:
                _expand_rows(
                    t, t_ptrs, mine, wrong, bank_ptr + tl.cast(m, tl.int64) * EXPERT_STRIDE, base_ptrs, out_ptrs,
                    key0, key1, threshold, scale, first, step, BASE, K_LO, K_HI, K_STRIDE, C_STRIDE, COLS, DROPOUT,
                    BLOCK_M, BLOCK_C, BLOCK_R, CHUNKS, PRECISION, DOT,
                )  # fmt: skip
