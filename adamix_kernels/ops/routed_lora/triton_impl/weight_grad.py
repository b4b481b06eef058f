"""Second and third launch of the backward, without atomics.

dA[m] = sum dt_n dropout(x)_n^T and dB[m] = scaling * sum dy_n t_n^T over the rows n routed to m. Each (block of
features, split of the rows, expert) writes its own float32 plane, zero where the expert served no row; the planes
are summed first to last. x is read once, dy once more than in the first launch.
"""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .tiles import keep_tile, row_keys


@triton.jit
def tile_rows(pid, perm_ptr, num_rows, BLOCK_M: tl.constexpr):
    """Row numbers [BLOCK_M] int32 of a tile, in the order of perm when there is one, and which of them exist."""
    rows = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < num_rows
    if perm_ptr is not None:
        rows = tl.load(perm_ptr + rows, mask=exists, other=0).to(tl.int32)
    return rows, exists



@triton.jit
def _mine(index_ptr, rows, exists, divisor, expert):
    """Which rows [BLOCK_M] go through `expert`: those of a wrong id through none."""
    return tl.load(index_ptr + rows // divisor, mask=exists, other=-1) == expert


@triton.jit
def _accumulate(
    small_ptr, wide_ptr, index_ptr, seed_ptr, perm_ptr, out_ptrs, out_ok, k, k_ok, cols, cols_ok, expert,
    row_lo, row_hi, num_rows, divisor, threshold, scale,
    SMALL_STRIDE: tl.constexpr, WIDE_STRIDE: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out [BLOCK_R, BLOCK_C] = scale * small^T wide over the expert's rows among tiles row_lo : row_hi."""
    first = row_lo
    last = row_hi
    if index_ptr is not None:
        # Only the tiles from the expert's first row to its last; none leaves an exact zero.
        first = row_hi
        last = row_lo
        for tile in range(row_lo, row_hi):
            rows, exists = tile_rows(tile, perm_ptr, num_rows, BLOCK_M)
            found = tl.max(_mine(index_ptr, rows, exists, divisor, expert).to(tl.int32), 0) > 0
            first = tl.where(found, tl.minimum(first, tile), first)
            last = tl.where(found, tile + 1, last)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(first, last):
        rows, mine = tile_rows(tile, perm_ptr, num_rows, BLOCK_M)
        if index_ptr is not None:
            mine = _mine(index_ptr, rows, mine, divisor, expert)
        small = tl.load(
            small_ptr + (rows.to(tl.int64) * SMALL_STRIDE)[None, :] + k[:, None],
            mask=k_ok[:, None] & mine[None, :],
            other=0.0,
        )
        wide = tl.load(
            wide_ptr + (rows.to(tl.int64) * WIDE_STRIDE)[:, None] + cols[None, :],
            mask=mine[:, None] & cols_ok[None, :],
            other=0.0,
        )
        if DROPOUT:
            key0, key1 = row_keys(seed_ptr, rows)
            wide = tl.where(keep_tile(key0, key1, cols, threshold), wide.to(DOT), 0.0)
        acc = tl.dot(small.to(DOT), wide.to(DOT), acc, input_precision=PRECISION)
    tl.store(out_ptrs, narrow(acc * scale, out_ptrs.dtype.element_ty), mask=out_ok)


@triton.jit(do_not_specialize=["num_rows", "split_tiles", "a_divisor", "b_divisor", "threshold"])
def lora_grads_kernel(
    x_ptr, grad_ptr, dt_ptr, t_ptr, a_index_ptr, b_index_ptr, seed_ptr, perm_ptr, a_plane_ptr, b_plane_ptr,
    split_tiles, num_rows, a_divisor, b_divisor, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr, OFFSETS: tl.constexpr,
    A_EXPERTS: tl.constexpr, B_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_RA: tl.constexpr, BLOCK_RB: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of A then of B, splits of the rows, experts); a program always writes its block of its plane."""
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    A_COLUMNS: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    A_BLOCKS: tl.constexpr = 0 if a_plane_ptr is None else A_COLUMNS * ((R + BLOCK_RA - 1) // BLOCK_RA)
    block = tl.program_id(0)
    split = tl.program_id(1)
    expert = tl.program_id(2)
    row_lo = split * split_tiles
    row_hi = tl.minimum(row_lo + split_tiles, (num_rows + BLOCK_M - 1) // BLOCK_M)
    if block < A_BLOCKS:
        if a_plane_ptr is not None:  # noqa: SIM102
            if expert < A_EXPERTS:
                k = (block // A_COLUMNS) * BLOCK_RA + tl.arange(0, BLOCK_RA)
                cols = (block % A_COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C)
                plane = (split * A_EXPERTS + expert).to(tl.int64) * (R * K)
                _accumulate(
                    dt_ptr, x_ptr, a_index_ptr, seed_ptr, perm_ptr,
                    a_plane_ptr + plane + k[:, None] * K + cols[None, :], (k < R)[:, None] & (cols < K)[None, :],
                    k, k < R, cols, cols < K, expert, row_lo, row_hi, num_rows, a_divisor, threshold, inv_keep,
                    R, K, seed_ptr is not None, BLOCK_M, BLOCK_C, BLOCK_RA, PRECISION, DOT,
                )  # fmt: skip
    else:
        if b_plane_ptr is not None:  # noqa: SIM102
            if expert < B_EXPERTS:
                B_COLUMNS: tl.constexpr = (NG + BLOCK_C - 1) // BLOCK_C
                CHUNKS: tl.constexpr = (RANK + BLOCK_RB - 1) // BLOCK_RB
                block -= A_BLOCKS
                group = block // (B_COLUMNS * CHUNKS)
                offset = 0
                for g in tl.static_range(GROUPS):
                    offset = tl.where(group == g, OFFSETS[g], offset)
                k = (block // B_COLUMNS % CHUNKS) * BLOCK_RB + tl.arange(0, BLOCK_RB)
                cols = (block % B_COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C)
                plane = ((split * B_EXPERTS + expert).to(tl.int64) * GROUPS + group) * (NG * RANK)
                _accumulate(
                    t_ptr + group * RANK, grad_ptr + offset, b_index_ptr, seed_ptr, perm_ptr,
                    b_plane_ptr + plane + k[:, None] + cols[None, :] * RANK,
                    (k < RANK)[:, None] & (cols < NG)[None, :],
                    k, k < RANK, cols, cols < NG, expert, row_lo, row_hi, num_rows, b_divisor, 0, scaling,
                    R, WIDTH, False, BLOCK_M, BLOCK_C, BLOCK_RB, PRECISION, DOT,
                )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def lora_sum_kernel(a_plane_ptr, b_plane_ptr, da_ptr, db_ptr, a_size, b_size, splits, BLOCK: tl.constexpr):
    """out = sum of the planes, first to last; blocks of dA, then blocks of dB."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a_end = (a_size + BLOCK - 1) // BLOCK * BLOCK
    acc = tl.zeros([BLOCK], tl.float32)
    if tl.program_id(0) * BLOCK < a_end:
        if da_ptr is not None:
            planes = a_plane_ptr + at
            for _ in range(splits):
                acc += tl.load(planes, mask=at < a_size, other=0.0)
                planes += a_size
            tl.store(da_ptr + at, narrow(acc, da_ptr.dtype.element_ty), mask=at < a_size)
    else:
        if db_ptr is not None:
            at -= a_end
            planes = b_plane_ptr + at
            for _ in range(splits):
                acc += tl.load(planes, mask=at < b_size, other=0.0)
                planes += b_size
            tl.store(db_ptr + at, narrow(acc, db_ptr.dtype.element_ty), mask=at < b_size)
