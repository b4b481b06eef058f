"""First launch of the backward: dt [N, groups*r] and dx; dy is read once, dx written once."""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .tiles import expand, row_experts, row_keys, shrink, tile_rows


@triton.jit(do_not_specialize=["num_rows", "a_divisor", "b_divisor", "threshold"])
def lora_dx_kernel(
    grad_ptr, a_ptr, b_ptr, a_index_ptr, b_index_ptr, seed_ptr, perm_ptr, dx_ptr, dt_ptr,
    num_rows, a_divisor, b_divisor, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr,
    OFFSETS: tl.constexpr, A_EXPERTS: tl.constexpr, B_EXPERTS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dt = scaling * dy B[j]; dx = keep / (1 - p) * (dt A[i]). Grid (row tiles, column splits); no dx_ptr, no dx."""
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    rows, exists = tile_rows(tl.program_id(0), perm_ptr, num_rows, BLOCK_M)
    long = rows.to(tl.int64)
    ids = rows
    low = 0
    high = 0
    wrong = rows < 0
    if b_index_ptr is not None:
        ids, low, high, wrong = row_experts(b_index_ptr, rows, exists, b_divisor, B_EXPERTS)

    dt_ptrs = dt_ptr + long * R
    for chunk in tl.static_range(CHUNKS):
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for g in tl.static_range(GROUPS):
            if chunk * BLOCK_R < (g + 1) * RANK and (chunk + 1) * BLOCK_R > g * RANK:
                acc = shrink(
                    acc, grad_ptr + long * WIDTH + OFFSETS[g], exists, ids, low, high, 0, 0, 0, b_ptr,
                    B_EXPERTS, GROUPS * NG * RANK, g * NG * RANK - g * RANK, chunk * BLOCK_R, g * RANK,
                    (g + 1) * RANK, 1, RANK, NG, WIDE, False, BLOCK_M, BLOCK_C, BLOCK_R, PRECISION, DOT,
                )  # fmt: skip
        # As in the forward: NaN in dx, nothing for the experts.
        dt = narrow(tl.where(wrong[:, None], 0.0, acc * scaling), dt_ptr.dtype.element_ty)
        k = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
        # Every split writes the same bits.
        tl.store(dt_ptrs[:, None] + k[None, :], dt, mask=exists[:, None] & (k < R)[None, :])

    if dx_ptr is not None:
        if CHUNKS > 1:
            tl.debug_barrier()
        DROPOUT: tl.constexpr = seed_ptr is not None
        key0 = 0
        key1 = 0
        if DROPOUT:
            key0, key1 = row_keys(seed_ptr, rows)
        if a_index_ptr is not None:
            ids, low, high, wrong_a = row_experts(a_index_ptr, rows, exists, a_divisor, A_EXPERTS)
            wrong = wrong | wrong_a
        expand(
            dt, dt_ptrs, exists, wrong, ids, low, high, a_ptr, None, dx_ptr + long * K, key0, key1, threshold, inv_keep,
            tl.program_id(1) * BLOCK_C, tl.num_programs(1) * BLOCK_C,
            A_EXPERTS, R * K, 0, 0, R, K, 1, K, DROPOUT, BLOCK_M, BLOCK_C, BLOCK_R, CHUNKS, PRECISION, DOT,
        )  # fmt: skip
