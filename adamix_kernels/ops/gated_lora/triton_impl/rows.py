"""Gated LoRA where a tile cannot hold all experts: a row for each slot of each row of x, grouped by expert.

Row e is slot e % SLOTS of row e // SLOTS of x. A tile of rows has one expert a side, as in the kernels without gates; a
gate is a factor of its row. What the slots of one row of x give is written apart, and summed in their order.
"""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from ..._gated_tiles import any_wrong, times
from ..._routed_tiles import poison, tile_experts, tile_rows
from ...routed_lora.triton_impl.tiles import expand, group_columns, row_keys, shrink


@triton.jit
def _factors(
    gates, scales, i, j, rows, own, valid, divisor,
    SLOTS: tl.constexpr, BY_SAMPLE: tl.constexpr, B_EXPERTS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M] gate times scale of rows of experts i and j, and the scale; 1 without gates."""
    scale = 1.0
    if scales is not None:
        scale = tl.load(scales + (j if B_EXPERTS > 1 else i))
    if gates is None:
        return tl.where(valid, scale, scale), scale
    else:
        at = rows.to(tl.int64)
        if BY_SAMPLE:
            at = own // divisor * SLOTS + rows % SLOTS
        return tl.load(gates + at, mask=valid, other=0.0).to(tl.float32) * scale, scale


@triton.jit
def _over_slots(
    z, gates, scales, index, own, valid, divisor, at, inside, R: tl.constexpr, RP: tl.constexpr, SLOTS: tl.constexpr,
    BY_SAMPLE: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Of each row of x the sum of gate (times scale) times z [., R] over its slots, columns `at`, float32."""
    total = tl.zeros([own.shape[0], RP], tl.float32)
    for slot in range(SLOTS):
        row = own * SLOTS + slot
        if BY_SAMPLE:
            gate = tl.load(gates + own // divisor * SLOTS + slot, mask=valid, other=0.0).to(tl.float32)
        else:
            gate = tl.load(gates + row, mask=valid, other=0.0).to(tl.float32)
        if scales is not None:
            ids = tl.load(index + row, mask=valid, other=0)
            gate *= tl.load(scales + ids, mask=(ids >= 0) & (ids < EXPERTS), other=0.0)
        one = tl.load(z + (row * R)[:, None] + at[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        total += one.to(tl.float32) * gate[:, None]
    return total


@triton.jit(do_not_specialize=["span", "divisor", "threshold"])
def gated_rows_forward_kernel(
    x_ptr, a_ptr, b_ptr, a_index_ptr, b_index_ptr, gates_ptr, scales_ptr, seed_ptr, z_ptr, out_ptr, t_ptr,
    perm_ptr, start_ptr, stop_ptr, span, divisor, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, OFFSETS: tl.constexpr, RP: tl.constexpr,
    CHUNKS: tl.constexpr, SLOTS: tl.constexpr, BY_SAMPLE: tl.constexpr,
    A_EXPERTS: tl.constexpr, B_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """t = dropout(x) A[i]^T; out [rows, groups * NG] = scaling * g s t B[j]^T.

    No out_ptr: nothing else is made. No x_ptr: t is given, and in its place stands z = sum_k g_k t_k of the row of x,
    kept in z_ptr [rows, R] where R is more than a chunk. Grid (row tiles, column splits).
    """
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    DROPOUT: tl.constexpr = seed_ptr is not None and x_ptr is not None
    rows, valid, top = tile_rows(span, perm_ptr, start_ptr, stop_ptr, BLOCK_M)
    long = rows.to(tl.int64)
    own = long // SLOTS
    i, _ = tile_experts(a_index_ptr, 1, rows, valid, top, perm_ptr, A_EXPERTS, False)
    j, _ = tile_experts(b_index_ptr, 1, rows, valid, top, perm_ptr, B_EXPERTS, False)
    wrong = any_wrong(a_index_ptr, own, valid, A_EXPERTS, SLOTS)
    wrong = wrong | any_wrong(b_index_ptr, own, valid, B_EXPERTS, SLOTS)
    key0 = 0
    key1 = 0
    if DROPOUT:
        key0, key1 = row_keys(seed_ptr, rows // SLOTS)
    # A bank of one gives all slots of a row the same t.
    t_ptrs = t_ptr + (long if A_EXPERTS > 1 else own) * R
    k = tl.arange(0, RP)
    if x_ptr is not None:
        for chunk in tl.static_range(CHUNKS):
            columns, live = group_columns(a_ptr, i, R * K, K, chunk * RP, 0, R, RP, A_EXPERTS, 1, False)
            t = shrink(
                tl.zeros([BLOCK_M, RP], tl.float32), x_ptr + own * K, valid, columns, live,
                key0, key1, threshold, 1, K, DROPOUT, BLOCK_C, STAGES, PRECISION, DOT,
            ) * inv_keep  # fmt: skip
            t = narrow(tl.where(wrong[:, None], 0.0, t), t_ptr.dtype.element_ty)
            # Every split writes the same bits.
            tl.store(t_ptrs[:, None] + chunk * RP + k[None, :], t, mask=valid[:, None] & (chunk * RP + k < R)[None, :])
    if out_ptr is not None:
        factor, _ = _factors(
            gates_ptr, scales_ptr, i, j, rows, own, valid, divisor, SLOTS, BY_SAMPLE, B_EXPERTS
        )  # fmt: skip
        if x_ptr is None:
            if CHUNKS > 1:
                t_ptrs = z_ptr + long * R
            for chunk in tl.static_range(CHUNKS):
                at = chunk * RP + k
                t = _over_slots(
                    t_ptr, gates_ptr, None, None, own, valid, divisor, at, at < R, R, RP, SLOTS, BY_SAMPLE, B_EXPERTS
                )  # fmt: skip
                t = narrow(t, t_ptr.dtype.element_ty)
                if CHUNKS > 1:
                    # Every split writes the same bits.
                    tl.store(t_ptrs[:, None] + at[None, :], t, mask=valid[:, None] & (at < R)[None, :])
        if CHUNKS > 1:
            tl.debug_barrier()
        t = poison(t.to(DOT), wrong)
        for g in tl.static_range(GROUPS):
            expand(
                t, t_ptrs, valid, wrong, j, b_ptr + (g * NG * RANK - g * RANK), None,
                out_ptr + long * (GROUPS * NG) + g * NG, key0, key1, threshold, (scaling * factor)[:, None],
                tl.program_id(1) * BLOCK_C, tl.num_programs(1) * BLOCK_C,
                GROUPS * NG * RANK, g * RANK, (g + 1) * RANK, 1, RANK, NG, False,
                RP, B_EXPERTS, 1, False, CHUNKS, BLOCK_M, BLOCK_C, STAGES, PRECISION, DOT,
            )  # fmt: skip


@triton.jit(do_not_specialize=["span", "divisor", "threshold"])
def gated_rows_dx_kernel(
    grad_ptr, t_ptr, a_ptr, b_ptr, a_index_ptr, b_index_ptr, gates_ptr, scales_ptr, seed_ptr,
    dx_ptr, u_ptr, dt_ptr, p_ptr, dgates_ptr, keys_ptr, perm_ptr, start_ptr, stop_ptr,
    span, divisor, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr, OFFSETS: tl.constexpr,
    RP: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr, BY_SAMPLE: tl.constexpr,
    A_EXPERTS: tl.constexpr, B_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dt = g s u, p = g s t [rows, R], dgates = s <t, u> and dx [rows, K]; u = scaling * dy B[j]. As input_grad.py.

    No t_ptr: dt is u itself, and neither p nor dgates is made. No grad_ptr: u [rows, R] is given, and the rest is that
    of mixed weights. keys: row_keys [N, 2]. Grid (row tiles, column splits).
    """
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    DROPOUT: tl.constexpr = seed_ptr is not None
    rows, valid, top = tile_rows(span, perm_ptr, start_ptr, stop_ptr, BLOCK_M)
    long = rows.to(tl.int64)
    own = long // SLOTS
    i, _ = tile_experts(a_index_ptr, 1, rows, valid, top, perm_ptr, A_EXPERTS, False)
    j, _ = tile_experts(b_index_ptr, 1, rows, valid, top, perm_ptr, B_EXPERTS, False)
    wrong = any_wrong(a_index_ptr, own, valid, A_EXPERTS, SLOTS)
    wrong = wrong | any_wrong(b_index_ptr, own, valid, B_EXPERTS, SLOTS)
    dt_ptrs = dt_ptr + long * R
    k = tl.arange(0, RP)
    if grad_ptr is not None:
        factor, scale = _factors(
            gates_ptr, scales_ptr, i, j, rows, own, valid, divisor, SLOTS, BY_SAMPLE, B_EXPERTS
        )  # fmt: skip
        dg = tl.zeros([BLOCK_M], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            u = tl.zeros([BLOCK_M, RP], tl.float32)
            for g in tl.static_range(GROUPS):
                if chunk * RP < (g + 1) * RANK and (chunk + 1) * RP > g * RANK:
                    columns, live = group_columns(
                        b_ptr + (g * NG * RANK - g * RANK), j, GROUPS * NG * RANK, 1, chunk * RP, g * RANK,
                        (g + 1) * RANK, RP, B_EXPERTS, 1, False,
                    )  # fmt: skip
                    u = shrink(
                        u, grad_ptr + own * WIDTH + OFFSETS[g], valid, columns, live,
                        0, 0, 0, RANK, NG, False, BLOCK_C, STAGES, PRECISION, DOT,
                    )  # fmt: skip
            u *= scaling
            at = (chunk * RP + k)[None, :]
            mask = valid[:, None] & (at < R)
            # Every split writes the same bits.
            if t_ptr is not None:
                t_ptrs = t_ptr + (long if A_EXPERTS > 1 else own) * R
                t = tl.load(t_ptrs[:, None] + at, mask=mask, other=0.0).to(tl.float32)
                dg += tl.sum(t * u, axis=1)
                if p_ptr is not None:
                    p = tl.where(wrong[:, None], 0.0, t * factor[:, None])
                    tl.store(p_ptr + (long * R)[:, None] + at, narrow(p, p_ptr.dtype.element_ty), mask=mask)
            # As in the forward: NaN in dx, nothing for the experts.
            dt = narrow(tl.where(wrong[:, None], 0.0, u * factor[:, None]), dt_ptr.dtype.element_ty)
            tl.store(dt_ptrs[:, None] + at, dt, mask=mask)
        if dgates_ptr is not None:
            dg = tl.where(wrong, float("nan"), dg * scale)
            tl.store(dgates_ptr + long, narrow(dg, dgates_ptr.dtype.element_ty), mask=valid)
        if CHUNKS > 1:
            tl.debug_barrier()
    else:
        factor, scale = _factors(
            gates_ptr, scales_ptr, i, j, rows, own, valid, divisor, SLOTS, BY_SAMPLE, B_EXPERTS
        )  # fmt: skip
        gate, _ = _factors(gates_ptr, None, i, j, rows, own, valid, divisor, SLOTS, BY_SAMPLE, B_EXPERTS)
        dg = tl.zeros([BLOCK_M], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            at = chunk * RP + k
            mask = valid[:, None] & (at < R)[None, :]
            to = (long * R)[:, None] + at[None, :]
            z = _over_slots(
                t_ptr, gates_ptr, None, None, own, valid, divisor, at, at < R, R, RP, SLOTS, BY_SAMPLE, B_EXPERTS
            )  # fmt: skip
            v = _over_slots(
                u_ptr, gates_ptr, scales_ptr, b_index_ptr, own, valid, divisor, at, at < R, R, RP, SLOTS, BY_SAMPLE,
                B_EXPERTS,
            )  # fmt: skip
            if dgates_ptr is not None:
                u = tl.load(u_ptr + to, mask=mask, other=0.0).to(tl.float32)
                t = tl.load(t_ptr + to, mask=mask, other=0.0).to(tl.float32)
                dg += tl.sum(times(u, z), axis=1) * scale + tl.sum(times(t, v), axis=1)
            # Every split writes the same bits.
            if p_ptr is not None:
                p = tl.where(wrong[:, None], 0.0, z * factor[:, None])
                tl.store(p_ptr + to, narrow(p, p_ptr.dtype.element_ty), mask=mask)
            dt = narrow(tl.where(wrong[:, None], 0.0, v * gate[:, None]), dt_ptr.dtype.element_ty)
            tl.store(dt_ptr + to, dt, mask=mask)
        if dgates_ptr is not None:
            dg = tl.where(wrong, float("nan"), dg)
            tl.store(dgates_ptr + long, narrow(dg, dgates_ptr.dtype.element_ty), mask=valid)
        if CHUNKS > 1:
            tl.debug_barrier()
    key0 = 0
    key1 = 0
    if DROPOUT:
        key0, key1 = row_keys(seed_ptr, rows // SLOTS)
    if keys_ptr is not None:
        tl.store(keys_ptr + own * 2, key0.to(tl.int32, bitcast=True), mask=valid)
        tl.store(keys_ptr + own * 2 + 1, key1.to(tl.int32, bitcast=True), mask=valid)
    if dx_ptr is not None:
        dt = poison(dt.to(DOT), wrong)
        expand(
            dt, dt_ptrs, valid, wrong, i, a_ptr, None, dx_ptr + long * K, key0, key1, threshold, inv_keep,
            tl.program_id(1) * BLOCK_C, tl.num_programs(1) * BLOCK_C, R * K, 0, R, K, 1, K, DROPOUT,
            RP, A_EXPERTS, 1, False, CHUNKS, BLOCK_M, BLOCK_C, STAGES, PRECISION, DOT,
        )  # fmt: skip
