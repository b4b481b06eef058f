"""The router and the LoRA it weighs in one launch, all experts' columns in one tile: x is read once.

out = base + scaling * sum_k g_k (dropout(x) A[i_k]^T) B[i_k]^T, as gated LoRA's kernel makes it; the gates stay in
registers. Beside out and t every program stores the logits, gates and ids of its rows: of several programs to a tile,
each a share of the output's columns, the first stores logits and gates, all the ids, which they may read again.
"""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from ..._routed_tiles import keep_own, spread, tile_rows
from ...gated_lora.triton_impl.tiles import copies, store_slots
from ...routed_lora.triton_impl.tiles import expand, group_columns, row_keys
from .tiles import all_gates, chosen_gates, per_column, shrink_beside, weigh


@triton.jit(do_not_specialize=["span", "threshold"])
def mixture_lora_forward_kernel(
    x_ptr, a_ptr, b_ptr, router_ptr, base_ptr, seed_ptr, out_ptr, t_ptr, gates_ptr, index_ptr, logits_ptr,
    span, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr, OFFSETS: tl.constexpr,
    GAPS: tl.constexpr, RP: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PADDED: tl.constexpr,
    A_EXPERTS: tl.constexpr, A_PADDED: tl.constexpr, A_MASKED: tl.constexpr,
    B_EXPERTS: tl.constexpr, B_PADDED: tl.constexpr, B_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column splits): each split computes the tile's gates and t, and writes its share of out."""
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    DROPOUT: tl.constexpr = seed_ptr is not None
    rows, valid, top = tile_rows(span, None, None, None, BLOCK_M)
    long = rows.to(tl.int64)
    zero = (top * 0).to(tl.int64)
    wrong = rows < 0
    first = tl.program_id(1) * BLOCK_C
    step = tl.num_programs(1) * BLOCK_C
    key0 = 0
    key1 = 0
    if DROPOUT:
        key0, key1 = row_keys(seed_ptr, rows)

    columns, live = group_columns(a_ptr, zero, R * K, K, 0, 0, R, RP, A_EXPERTS, A_PADDED, A_MASKED)
    wide, logits = shrink_beside(
        x_ptr + long * K, valid, columns, live, router_ptr, key0, key1, threshold,
        K, A_PADDED * RP, EXPERTS, PADDED, DROPOUT, BLOCK_M, BLOCK_C, STAGES, PRECISION, DOT,
    )  # fmt: skip
    wide *= inv_keep

    m = tl.arange(0, PADDED)[None, :]
    exists = valid[:, None] & (m < EXPERTS)
    mine = exists & (tl.program_id(1) == 0)
    tl.store(logits_ptr + long[:, None] * EXPERTS + m, logits, mask=mine)
    kept = narrow(wide, t_ptr.dtype.element_ty)
    uses = zero
    if TOP_K == 0:
        gates = all_gates(logits, EXPERTS, PADDED, BLOCK_M)
        tl.store(gates_ptr + long[:, None] * EXPERTS + m, gates, mask=mine)
        kept_ptrs = t_ptr + long * ((EXPERTS if A_MASKED else 1) * R)
        store_slots(kept_ptrs, kept, None, long, valid, A_EXPERTS, R, EXPERTS, RP, A_PADDED, A_MASKED)
    else:
        gates, slots = chosen_gates(logits, EXPERTS, TOP_K, PADDED, BLOCK_M)
        at = long[:, None] * TOP_K + slots
        tl.store(gates_ptr + at, gates, mask=mine & (slots >= 0))
        tl.store(index_ptr + at, tl.broadcast_to(m, [BLOCK_M, PADDED]).to(tl.int64), mask=exists & (slots >= 0))
        if A_MASKED:
            slot = per_column(slots, PADDED, RP, A_PADDED, BLOCK_M)
            k = (tl.arange(0, A_PADDED * RP) % RP)[None, :]
            slot_ptrs = t_ptr + (long * (TOP_K * R))[:, None] + slot * R + k
            tl.store(slot_ptrs, kept, mask=valid[:, None] & (slot >= 0) & (k < R))
        else:
            store_slots(t_ptr + long * R, kept, None, long, valid, A_EXPERTS, R, TOP_K, RP, A_PADDED, A_MASKED)
        if B_MASKED:
            # Where an expert's weights are infinite, the ids are read again.
            uses = index_ptr + long * TOP_K
            tl.debug_barrier()

    if not (A_MASKED and B_MASKED):
        if not B_MASKED:
            wide = weigh(wide, gates, TOP_K, PADDED, RP, A_PADDED, BLOCK_M)
        own = keep_own(wide, zero, RP, A_PADDED, False, BLOCK_M)
        if B_MASKED:
            wide = copies(own, RP, B_PADDED, BLOCK_M)
        else:
            wide = spread(own, zero, RP, B_PADDED, False, BLOCK_M)
    if B_MASKED:
        wide = weigh(wide, gates, TOP_K, PADDED, RP, B_PADDED, BLOCK_M)
    p = narrow(wide, DOT)
    for g in tl.static_range(GROUPS):
        base_ptrs = None
        if base_ptr is not None:
            base_ptrs = base_ptr + long * WIDTH + OFFSETS[g]
        # Column k of the tile is column k - g * RANK of the group's B.
        expand(
            p, None, valid, wrong, uses, b_ptr + (g * NG * RANK - g * RANK), base_ptrs,
            out_ptr + long * WIDTH + OFFSETS[g], key0, key1, threshold, scaling, first, step,
            GROUPS * NG * RANK, g * RANK, (g + 1) * RANK, 1, RANK, NG, False,
            RP, B_EXPERTS, B_PADDED, B_MASKED, 1, BLOCK_M, BLOCK_C, STAGES, PRECISION, DOT, TOP_K,
        )  # fmt: skip
    for gap in tl.static_range(len(GAPS)):
        for start in tl.range(first, GAPS[gap][1], step, num_stages=STAGES):
            c = start + tl.arange(0, BLOCK_C)
            there = (long * WIDTH + GAPS[gap][0])[:, None] + c[None, :]
            mask = valid[:, None] & (c < GAPS[gap][1])[None, :]
            value = tl.zeros([BLOCK_M, BLOCK_C], out_ptr.dtype.element_ty)
            if base_ptr is not None:
                value = tl.load(base_ptr + there, mask=mask, other=0.0)
            tl.store(out_ptr + there, value, mask=mask)
