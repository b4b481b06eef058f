"""First launch of the backward: dt [N, groups*r] and dx; dy is read once, dx written once."""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from ..._routed_tiles import keep_own, poison, spread, tile_experts, tile_rows
from .tiles import expand, group_columns, row_keys, shrink


@triton.jit(do_not_specialize=["span", "a_divisor", "b_divisor", "threshold"])
def lora_dx_kernel(
    grad_ptr, a_ptr, b_ptr, a_index_ptr, b_index_ptr, seed_ptr, dx_ptr, dt_ptr, keys_ptr,
    perm_ptr, start_ptr, stop_ptr,
    span, a_divisor, b_divisor, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr,
    OFFSETS: tl.constexpr, RP: tl.constexpr, CHUNKS: tl.constexpr,
    A_EXPERTS: tl.constexpr, A_PADDED: tl.constexpr, A_MASKED: tl.constexpr,
    B_EXPERTS: tl.constexpr, B_PADDED: tl.constexpr, B_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dt = scaling * dy B[j]; dx = keep / (1 - p) * (dt A[i]); keys: row_keys [N, 2].

    Grid (row tiles, column splits); no dx_ptr, no dx.
    """
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    DROPOUT: tl.constexpr = seed_ptr is not None
    rows, valid, top = tile_rows(span, perm_ptr, start_ptr, stop_ptr, BLOCK_M)
    long = rows.to(tl.int64)
    j, wrong = tile_experts(b_index_ptr, b_divisor, rows, valid, top, perm_ptr, B_EXPERTS, B_MASKED)
    i, wrong_a = tile_experts(a_index_ptr, a_divisor, rows, valid, top, perm_ptr, A_EXPERTS, A_MASKED)

    dt_ptrs = dt_ptr + long * R
    for chunk in tl.static_range(CHUNKS):
        wide = tl.zeros([BLOCK_M, B_PADDED * RP], tl.float32)
        for g in tl.static_range(GROUPS):
            if chunk * RP < (g + 1) * RANK and (chunk + 1) * RP > g * RANK:
                columns, live = group_columns(
                    b_ptr + (g * NG * RANK - g * RANK), j, GROUPS * NG * RANK, 1, chunk * RP, g * RANK,
                    (g + 1) * RANK, RP, B_EXPERTS, B_PADDED, B_MASKED,
                )  # fmt: skip
                wide = shrink(
                    wide, grad_ptr + long * WIDTH + OFFSETS[g], valid, columns, live,
                    0, 0, 0, RANK, NG, False, BLOCK_C, STAGES, PRECISION, DOT,
                )  # fmt: skip
        # As in the forward: NaN in dx, nothing for the experts.
        acc = keep_own(wide, j, RP, B_PADDED, B_MASKED, BLOCK_M) * scaling
        dt = narrow(tl.where(wrong[:, None], 0.0, acc), dt_ptr.dtype.element_ty)
        k = chunk * RP + tl.arange(0, RP)
        # Every split writes the same bits.
        tl.store(dt_ptrs[:, None] + k[None, :], dt, mask=valid[:, None] & (k < R)[None, :])

    key0 = 0
    key1 = 0
    if DROPOUT:
        key0, key1 = row_keys(seed_ptr, rows)
    if keys_ptr is not None:
        tl.store(keys_ptr + long * 2, key0.to(tl.int32, bitcast=True), mask=valid)
        tl.store(keys_ptr + long * 2 + 1, key1.to(tl.int32, bitcast=True), mask=valid)
    if dx_ptr is not None:
        if CHUNKS > 1:
            tl.debug_barrier()
        wrong = wrong | wrong_a
        dt = poison(spread(dt.to(DOT), i, RP, A_PADDED, A_MASKED, BLOCK_M), wrong)
        expand(
            dt, dt_ptrs, valid, wrong, i, a_ptr, None, dx_ptr + long * K, key0, key1, threshold, inv_keep,
            tl.program_id(1) * BLOCK_C, tl.num_programs(1) * BLOCK_C, R * K, 0, R, K, 1, K, DROPOUT,
            RP, A_EXPERTS, A_PADDED, A_MASKED, CHUNKS, BLOCK_M, BLOCK_C, STAGES, PRECISION, DOT,
        )  # fmt: skip
