"""First launch of the backward: dx, the gates' gradients, and what the weights' gradients are products of.

dy is read once, dx written once. With t_k = dropout(x) A_k^T and u_k = scaling * dy B_k, in float32:

    outputs   p_k = g_k s_k t_k,  dt_k = g_k s_k u_k,  dg_k = s_k <t_k, u_k>
    weights   p_k = g_k s_k z,    dt_k = g_k v,        dg_k = s_k <u_k, z> + <v, t_k>
              z = sum g_k t_k, v = sum g_k s_k u_k

dA_k = sum_n dt_k^T dropout(x), dB_k = scaling * sum_n dy^T p_k, dx = keep / (1 - p) * sum_k dt_k A_k. On the side of a
bank of one, dt or p is the sum over k.
"""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from ..._gated_tiles import any_wrong
from ..._routed_tiles import keep_own, poison, spread, tile_rows
from ...routed_lora.triton_impl.tiles import expand, group_columns, row_keys, shrink
from .tiles import copies, load_slots, slot_of, store_slots, sums, weigh


@triton.jit(do_not_specialize=["span", "divisor", "threshold"])
def gated_lora_dx_kernel(
    grad_ptr, t_ptr, a_ptr, b_ptr, a_index_ptr, b_index_ptr, gates_ptr, scales_ptr, seed_ptr,
    dx_ptr, dt_ptr, p_ptr, dgates_ptr, keys_ptr, span, divisor, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr, OFFSETS: tl.constexpr,
    RP: tl.constexpr, SLOTS: tl.constexpr, BY_SAMPLE: tl.constexpr, WEIGHTS: tl.constexpr,
    A_EXPERTS: tl.constexpr, A_PADDED: tl.constexpr, A_MASKED: tl.constexpr,
    B_EXPERTS: tl.constexpr, B_PADDED: tl.constexpr, B_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dt [N, Ma * R] and p [N, Mb * R] hold all experts of their bank, 0 where no slot names one; dgates [N, SLOTS].

    Grid (row tiles, column splits); keys: row_keys [N, 2]. What has no pointer is not made.
    """
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    DROPOUT: tl.constexpr = seed_ptr is not None
    CHOSEN: tl.constexpr = a_index_ptr is not None or b_index_ptr is not None
    MIXED: tl.constexpr = WEIGHTS and A_MASKED and B_MASKED
    EXPERTS: tl.constexpr = max(A_EXPERTS, B_EXPERTS)
    MP: tl.constexpr = max(A_PADDED, B_PADDED)
    index_ptr = b_index_ptr if B_MASKED or a_index_ptr is None else a_index_ptr
    rows, valid, top = tile_rows(span, None, None, None, BLOCK_M)
    long = rows.to(tl.int64)
    at = long
    if BY_SAMPLE:
        at = (rows // divisor).to(tl.int64)
    zero = (top * 0).to(tl.int64)
    wrong = rows < 0
    if CHOSEN:
        wrong = any_wrong(a_index_ptr, at, valid, A_EXPERTS, SLOTS)
        wrong = wrong | any_wrong(b_index_ptr, at, valid, B_EXPERTS, SLOTS)

    u = tl.zeros([BLOCK_M, B_PADDED * RP], tl.float32)
    if dx_ptr is not None or dt_ptr is not None or dgates_ptr is not None:
        for g in tl.static_range(GROUPS):
            columns, live = group_columns(
                b_ptr + (g * NG * RANK - g * RANK), zero, GROUPS * NG * RANK, 1, 0, g * RANK,
                (g + 1) * RANK, RP, B_EXPERTS, B_PADDED, B_MASKED,
            )  # fmt: skip
            u = shrink(
                u, grad_ptr + long * WIDTH + OFFSETS[g], valid, columns, live,
                0, 0, 0, RANK, NG, False, BLOCK_C, STAGES, PRECISION, DOT,
            )  # fmt: skip
        u *= scaling
    t = load_slots(
        t_ptr + long * ((SLOTS if A_MASKED else 1) * R), a_index_ptr, at, valid,
        A_EXPERTS, R, SLOTS, RP, A_PADDED, A_MASKED,
    )  # fmt: skip
    # Both as wide as the wider bank; in `weights` z and v stand beside them.
    if B_MASKED and not A_MASKED:
        t = copies(keep_own(t, zero, RP, A_PADDED, False, BLOCK_M), RP, MP, BLOCK_M)
    if A_MASKED and not B_MASKED:
        u = copies(keep_own(u, zero, RP, B_PADDED, False, BLOCK_M), RP, MP, BLOCK_M)
    z = t
    v = u
    if MIXED:
        z = weigh(t, gates_ptr, a_index_ptr, None, at, valid, EXPERTS, SLOTS, RP, MP)
        z = copies(keep_own(z, zero, RP, MP, False, BLOCK_M), RP, MP, BLOCK_M)
        v = weigh(u, gates_ptr, b_index_ptr, scales_ptr, at, valid, EXPERTS, SLOTS, RP, MP)
        v = copies(keep_own(v, zero, RP, MP, False, BLOCK_M), RP, MP, BLOCK_M)

    # Every split writes the same bits.
    if dgates_ptr is not None:
        each = sums(u * z, RP, MP, BLOCK_M)
        other = each
        if MIXED:
            other = sums(t * v, RP, MP, BLOCK_M)
        if CHOSEN:
            for slot in tl.static_range(SLOTS):
                dg = slot_of(each, index_ptr, scales_ptr, at, valid, slot, EXPERTS, SLOTS, MP)
                if MIXED:
                    dg += slot_of(other, a_index_ptr, None, at, valid, slot, EXPERTS, SLOTS, MP)
                dg = narrow(tl.where(wrong, float("nan"), dg), dgates_ptr.dtype.element_ty)
                tl.store(dgates_ptr + long * SLOTS + slot, dg, mask=valid)
        else:
            m = tl.arange(0, MP)[None, :]
            if scales_ptr is not None:
                each *= tl.load(scales_ptr + m, mask=m < EXPERTS, other=0.0)
            if MIXED:
                each += other
            each = narrow(each, dgates_ptr.dtype.element_ty)
            tl.store(dgates_ptr + long[:, None] * SLOTS + m, each, mask=valid[:, None] & (m < EXPERTS))
    if p_ptr is not None:
        p = weigh(z, gates_ptr, index_ptr, scales_ptr, at, valid, EXPERTS, SLOTS, RP, MP)
        if CHOSEN:
            p = tl.where(wrong[:, None], 0.0, p)
        if not B_MASKED:
            p = spread(keep_own(p, zero, RP, MP, False, BLOCK_M), zero, RP, B_PADDED, False, BLOCK_M)
        p = narrow(p, p_ptr.dtype.element_ty)
        store_slots(p_ptr + long * (B_EXPERTS * R), p, None, at, valid, B_EXPERTS, R, SLOTS, RP, B_PADDED, B_MASKED)

    if keys_ptr is not None or (DROPOUT and dx_ptr is not None):
        key0, key1 = row_keys(seed_ptr, rows)
    else:
        key0 = 0
        key1 = 0
    if keys_ptr is not None:
        tl.store(keys_ptr + long * 2, key0.to(tl.int32, bitcast=True), mask=valid)
        tl.store(keys_ptr + long * 2 + 1, key1.to(tl.int32, bitcast=True), mask=valid)
    if dx_ptr is not None or dt_ptr is not None:
        if MIXED:
            d = weigh(v, gates_ptr, a_index_ptr, None, at, valid, EXPERTS, SLOTS, RP, MP)
        else:
            d = weigh(v, gates_ptr, index_ptr, scales_ptr, at, valid, EXPERTS, SLOTS, RP, MP)
        if CHOSEN:
            # As in the forward: NaN in dx, nothing for the experts.
            d = tl.where(wrong[:, None], 0.0, d)
        if not A_MASKED:
            d = spread(keep_own(d, zero, RP, MP, False, BLOCK_M), zero, RP, A_PADDED, False, BLOCK_M)
        if dt_ptr is not None:
            dt = narrow(d, dt_ptr.dtype.element_ty)
            to = dt_ptr + long * (A_EXPERTS * R)
            store_slots(to, dt, None, at, valid, A_EXPERTS, R, SLOTS, RP, A_PADDED, A_MASKED)
        if dx_ptr is not None:
            dt = narrow(d, DOT)
            if CHOSEN:
                dt = poison(dt, wrong)
            uses = zero
            if CHOSEN and A_MASKED:
                uses = a_index_ptr + at * SLOTS
            expand(
                dt, None, valid, wrong, uses, a_ptr, None, dx_ptr + long * K, key0, key1, threshold, inv_keep,
                tl.program_id(1) * BLOCK_C, tl.num_programs(1) * BLOCK_C, R * K, 0, R, K, 1, K, DROPOUT,
                RP, A_EXPERTS, A_PADDED, A_MASKED, 1, BLOCK_M, BLOCK_C, STAGES, PRECISION, DOT,
                SLOTS if CHOSEN else 0,
            )  # fmt: skip
