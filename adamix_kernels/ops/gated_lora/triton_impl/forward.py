"""out = base + scaling * sum_k g_k s_k (dropout(x) A[i_k]^T) B[j_k]^T in one launch, all experts' columns in one tile.

The products of all experts of a tile are made, as where tokens are routed; what masks them there are the gates here.
With WEIGHTS z = sum_k g_k dropout(x) A[i_k]^T is summed first, and takes the place of each slot's own product.
"""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from ..._gated_tiles import any_wrong
from ..._routed_tiles import keep_own, poison, spread, tile_rows
from ...routed_lora.triton_impl.tiles import expand, group_columns, row_keys, shrink
from .tiles import copies, store_slots, weigh


@triton.jit(do_not_specialize=["span", "divisor", "threshold"])
def gated_lora_forward_kernel(
    x_ptr, a_ptr, b_ptr, a_index_ptr, b_index_ptr, gates_ptr, scales_ptr, base_ptr, seed_ptr, out_ptr, t_ptr,
    span, divisor, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr, OFFSETS: tl.constexpr,
    GAPS: tl.constexpr, RP: tl.constexpr, SLOTS: tl.constexpr, BY_SAMPLE: tl.constexpr, WEIGHTS: tl.constexpr,
    A_EXPERTS: tl.constexpr, A_PADDED: tl.constexpr, A_MASKED: tl.constexpr,
    B_EXPERTS: tl.constexpr, B_PADDED: tl.constexpr, B_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column splits): each split computes the tile's t and writes its share of the columns."""
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    DROPOUT: tl.constexpr = seed_ptr is not None
    CHOSEN: tl.constexpr = a_index_ptr is not None or b_index_ptr is not None
    index_ptr = b_index_ptr if B_MASKED or a_index_ptr is None else a_index_ptr
    EXPERTS: tl.constexpr = max(A_EXPERTS, B_EXPERTS)
    rows, valid, top = tile_rows(span, None, None, None, BLOCK_M)
    long = rows.to(tl.int64)
    at = long
    if BY_SAMPLE:
        at = (rows // divisor).to(tl.int64)
    zero = (top * 0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_C
    step = tl.num_programs(1) * BLOCK_C
    key0 = 0
    key1 = 0
    if DROPOUT:
        key0, key1 = row_keys(seed_ptr, rows)

    columns, live = group_columns(a_ptr, zero, R * K, K, 0, 0, R, RP, A_EXPERTS, A_PADDED, A_MASKED)
    wide = shrink(
        tl.zeros([BLOCK_M, A_PADDED * RP], tl.float32), x_ptr + long * K, valid, columns, live,
        key0, key1, threshold, 1, K, DROPOUT, BLOCK_C, STAGES, PRECISION, DOT,
    ) * inv_keep  # fmt: skip
    wrong = rows < 0
    t = wide
    if CHOSEN:
        wrong = any_wrong(a_index_ptr, at, valid, A_EXPERTS, SLOTS)
        wrong = wrong | any_wrong(b_index_ptr, at, valid, B_EXPERTS, SLOTS)
        # A row with a wrong id is NaN in the output; what is saved of it is 0, so that it teaches no expert.
        t = tl.where(wrong[:, None], 0.0, t)
    # Every split writes the same bits.
    store_slots(
        t_ptr + long * ((SLOTS if A_MASKED else 1) * R), narrow(t, t_ptr.dtype.element_ty), a_index_ptr, at, valid,
        A_EXPERTS, R, SLOTS, RP, A_PADDED, A_MASKED,
    )  # fmt: skip

    if WEIGHTS and A_MASKED and B_MASKED:
        wide = weigh(wide, gates_ptr, a_index_ptr, None, at, valid, A_EXPERTS, SLOTS, RP, A_PADDED)
    if not (A_MASKED and B_MASKED) or WEIGHTS:
        if not B_MASKED:
            wide = weigh(wide, gates_ptr, index_ptr, scales_ptr, at, valid, EXPERTS, SLOTS, RP, A_PADDED)
        own = keep_own(wide, zero, RP, A_PADDED, False, BLOCK_M)
        if B_MASKED:
            wide = copies(own, RP, B_PADDED, BLOCK_M)
        else:
            wide = spread(own, zero, RP, B_PADDED, False, BLOCK_M)
    if B_MASKED:
        wide = weigh(wide, gates_ptr, index_ptr, scales_ptr, at, valid, EXPERTS, SLOTS, RP, B_PADDED)
    p = narrow(wide, DOT)
    if CHOSEN:
        p = poison(p, wrong)
    uses = zero
    if CHOSEN and B_MASKED:
        uses = b_index_ptr + at * SLOTS
    for g in tl.static_range(GROUPS):
        base_ptrs = None
        if base_ptr is not None:
            base_ptrs = base_ptr + long * WIDTH + OFFSETS[g]
        # Column k of the tile is column k - g * RANK of the group's B.
        expand(
            p, None, valid, wrong, uses, b_ptr + (g * NG * RANK - g * RANK), base_ptrs,
            out_ptr + long * WIDTH + OFFSETS[g], key0, key1, threshold, scaling, first, step,
            GROUPS * NG * RANK, g * RANK, (g + 1) * RANK, 1, RANK, NG, False,
            RP, B_EXPERTS, B_PADDED, B_MASKED, 1, BLOCK_M, BLOCK_C, STAGES, PRECISION, DOT,
            SLOTS if CHOSEN else 0,
        )  # fmt: skip
    for gap in tl.static_range(len(GAPS)):
        for start in tl.range(first, GAPS[gap][1], step, num_stages=STAGES):
            c = start + tl.arange(0, BLOCK_C)
            to = (long * WIDTH + GAPS[gap][0])[:, None] + c[None, :]
            mask = valid[:, None] & (c < GAPS[gap][1])[None, :]
            value = tl.zeros([BLOCK_M, BLOCK_C], out_ptr.dtype.element_ty)
            if base_ptr is not None:
                value = tl.load(base_ptr + to, mask=mask, other=0.0)
            tl.store(out_ptr + to, value, mask=mask)
