"""out = base + scaling * (dropout(x) A[i]^T) B[j]^T in one launch: the [tile, r] product never leaves the program."""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .tiles import expand, row_experts, row_keys, shrink, tile_rows


@triton.jit(do_not_specialize=["num_rows", "a_divisor", "b_divisor", "threshold"])
def lora_forward_kernel(
    x_ptr, a_ptr, b_ptr, a_index_ptr, b_index_ptr, base_ptr, seed_ptr, perm_ptr, out_ptr, t_ptr,
    num_rows, a_divisor, b_divisor, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr,
    OFFSETS: tl.constexpr, GAPS: tl.constexpr, A_EXPERTS: tl.constexpr, B_EXPERTS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column splits): each split computes the tile's t and writes its share of the columns."""
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    rows, exists = tile_rows(tl.program_id(0), perm_ptr, num_rows, BLOCK_M)
    long = rows.to(tl.int64)
    first = tl.program_id(1) * BLOCK_C
    step = tl.num_programs(1) * BLOCK_C
    DROPOUT: tl.constexpr = seed_ptr is not None
    key0 = 0
    key1 = 0
    if DROPOUT:
        key0, key1 = row_keys(seed_ptr, rows)
    ids = rows
    low = 0
    high = 0
    wrong = rows < 0
    if a_index_ptr is not None:
        ids, low, high, wrong = row_experts(a_index_ptr, rows, exists, a_divisor, A_EXPERTS)

    t_ptrs = t_ptr + long * R
    for chunk in tl.static_range(CHUNKS):
        acc = shrink(
            tl.zeros([BLOCK_M, BLOCK_R], tl.float32), x_ptr + long * K, exists, ids, low, high,
            key0, key1, threshold, a_ptr,
            A_EXPERTS, R * K, 0, chunk * BLOCK_R, 0, R, K, 1, K, WIDE, DROPOUT,
            BLOCK_M, BLOCK_C, BLOCK_R, PRECISION, DOT,
        )  # fmt: skip
        # A row with a wrong id is NaN in the output; what is saved of it is 0, so that it teaches no expert.
        acc = tl.where(wrong[:, None], 0.0, acc * inv_keep)
        t = narrow(acc, t_ptr.dtype.element_ty)
        k = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
        # Every split writes the same bits.
        tl.store(t_ptrs[:, None] + k[None, :], t, mask=exists[:, None] & (k < R)[None, :])
    if CHUNKS > 1:
        tl.debug_barrier()

    if b_index_ptr is not None:
        ids, low, high, wrong_b = row_experts(b_index_ptr, rows, exists, b_divisor, B_EXPERTS)
        wrong = wrong | wrong_b
    for g in tl.static_range(GROUPS):
        base_ptrs = None
        if base_ptr is not None:
            base_ptrs = base_ptr + long * WIDTH + OFFSETS[g]
        expand(
            t, t_ptrs, exists, wrong, ids, low, high, b_ptr, base_ptrs, out_ptr + long * WIDTH + OFFSETS[g],
            key0, key1, threshold, scaling, first, step,
            B_EXPERTS, GROUPS * NG * RANK, g * NG * RANK - g * RANK, g * RANK, (g + 1) * RANK, 1, RANK, NG, False,
            BLOCK_M, BLOCK_C, BLOCK_R, CHUNKS, PRECISION, DOT,
        )  # fmt: skip
    for gap in tl.static_range(len(GAPS)):
        for c0 in range(first, GAPS[gap][1], step):
            cols = c0 + tl.arange(0, BLOCK_C)
            at = (long * WIDTH + GAPS[gap][0])[:, None] + cols[None, :]
            ok = exists[:, None] & (cols < GAPS[gap][1])[None, :]
            value = tl.zeros([BLOCK_M, BLOCK_C], out_ptr.dtype.element_ty)
            if base_ptr is not None:
                value = tl.load(base_ptr + at, mask=ok, other=0.0)
            tl.store(out_ptr + at, value, mask=ok)
