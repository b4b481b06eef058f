"""out = base + scaling * (dropout(x) A[i]^T) B[j]^T in one launch: the [tile, r] product never leaves the program.

x and base are read once and the output is written once, each a wide tile at a time and some tiles ahead.
"""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from ..._routed_tiles import keep_own, poison, spread, tile_experts, tile_rows
from .tiles import expand, group_columns, row_keys, shrink


@triton.jit(do_not_specialize=["span", "a_divisor", "b_divisor", "threshold"])
def lora_forward_kernel(
    x_ptr, a_ptr, b_ptr, a_index_ptr, b_index_ptr, base_ptr, seed_ptr, out_ptr, t_ptr, perm_ptr, start_ptr, stop_ptr,
    span, a_divisor, b_divisor, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr,
    OFFSETS: tl.constexpr, GAPS: tl.constexpr, RP: tl.constexpr, CHUNKS: tl.constexpr,
    A_EXPERTS: tl.constexpr, A_PADDED: tl.constexpr, A_MASKED: tl.constexpr,
    B_EXPERTS: tl.constexpr, B_PADDED: tl.constexpr, B_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column splits): each split computes the tile's t and writes its share of the columns."""
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    DROPOUT: tl.constexpr = seed_ptr is not None
    rows, valid, top = tile_rows(span, perm_ptr, start_ptr, stop_ptr, BLOCK_M)
    long = rows.to(tl.int64)
    first = tl.program_id(1) * BLOCK_C
    step = tl.num_programs(1) * BLOCK_C
    key0 = 0
    key1 = 0
    if DROPOUT:
        key0, key1 = row_keys(seed_ptr, rows)
    i, wrong = tile_experts(a_index_ptr, a_divisor, rows, valid, top, perm_ptr, A_EXPERTS, A_MASKED)
    j, wrong_b = tile_experts(b_index_ptr, b_divisor, rows, valid, top, perm_ptr, B_EXPERTS, B_MASKED)

    t_ptrs = t_ptr + long * R
    for chunk in tl.static_range(CHUNKS):
        columns, live = group_columns(a_ptr, i, R * K, K, chunk * RP, 0, R, RP, A_EXPERTS, A_PADDED, A_MASKED)
        wide = shrink(
            tl.zeros([BLOCK_M, A_PADDED * RP], tl.float32), x_ptr + long * K, valid, columns, live,
            key0, key1, threshold, 1, K, DROPOUT, BLOCK_C, STAGES, PRECISION, DOT,
        )  # fmt: skip
        acc = keep_own(wide, i, RP, A_PADDED, A_MASKED, BLOCK_M) * inv_keep
        # A row whose id of A is wrong is NaN in the output; what is saved of it is 0, so that it teaches no expert.
        t = narrow(tl.where(wrong[:, None], 0.0, acc), t_ptr.dtype.element_ty)
        k = chunk * RP + tl.arange(0, RP)
        # Every split writes the same bits.
        tl.store(t_ptrs[:, None] + k[None, :], t, mask=valid[:, None] & (k < R)[None, :])
    if CHUNKS > 1:
        tl.debug_barrier()

    wrong = wrong | wrong_b
    t = poison(spread(t.to(DOT), j, RP, B_PADDED, B_MASKED, BLOCK_M), wrong)
    for g in tl.static_range(GROUPS):
        base_ptrs = None
        if base_ptr is not None:
            base_ptrs = base_ptr + long * WIDTH + OFFSETS[g]
        # Column k of the tile's t is column k - g * RANK of the group's B.
        expand(
            t, t_ptrs, valid, wrong, j, b_ptr + (g * NG * RANK - g * RANK), base_ptrs,
            out_ptr + long * WIDTH + OFFSETS[g], key0, key1, threshold, scaling, first, step,
            GROUPS * NG * RANK, g * RANK, (g + 1) * RANK, 1, RANK, NG, False,
            RP, B_EXPERTS, B_PADDED, B_MASKED, CHUNKS, BLOCK_M, BLOCK_C, STAGES, PRECISION, DOT,
        )  # fmt: skip
    for gap in tl.static_range(len(GAPS)):
        for start in tl.range(first, GAPS[gap][1], step, num_stages=STAGES):
            c = start + tl.arange(0, BLOCK_C)
            at = (long * WIDTH + GAPS[gap][0])[:, None] + c[None, :]
            mask = valid[:, None]
            if GAPS[gap][1] % BLOCK_C != 0:
                mask = mask & (c < GAPS[gap][1])[None, :]
            value = tl.zeros([BLOCK_M, BLOCK_C], out_ptr.dtype.element_ty)
            if base_ptr is not None:
                value = tl.load(base_ptr + at, mask=mask, other=0.0)
            tl.store(out_ptr + at, value, mask=mask)
