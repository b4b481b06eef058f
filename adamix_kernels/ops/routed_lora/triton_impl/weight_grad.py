"""Second and third launch of the backward, without atomics.

dA[m] = sum dt_n dropout(x)_n^T and dB[m] = scaling * sum dy_n t_n^T over the rows n routed to m. The rows are split;
each program sums one block of features over one split into float32 planes, and the planes are summed first to last.
x is read once, dy once more than in the first launch. How a side's rows find their expert (MODE; weights.py decides):

    all      the bank has one expert; a plane for each split
    parts    a split is part of a sample: of one expert, which only the sum needs to know; a plane for each split
    samples  the first of every `share` samples of an expert sums them, into the gradient where they are all of its
             samples, else into a plane (plane_sum.plane_of); the others' programs end at once
    tokens   rows differ in expert: one product with every row's narrow columns in its own expert's place
    sorted   rows are grouped by expert; programs for each, planes [split, expert]
    gated    a row holds the columns of all experts, gated (ops/gated_lora); as tokens, but of every column. With an
             index a row has SLOTS experts, without one it has them all
"""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from .plane_sum import plane_of
from .tiles import drop_tile, names


@triton.jit
def _products(
    acc, begin, end, own, small_ptr, wide_ptr, index_ptr, perm_ptr, keys_ptr, divisor, threshold,
    m, k, k_ok, cols,
    SMALL_STRIDE: tl.constexpr, WIDE_STRIDE: tl.constexpr, C: tl.constexpr, EXPERTS: tl.constexpr,
    CHECKED: tl.constexpr, SPREAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr, SLOTS: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """acc [W, BLOCK_C] += small^T wide over rows begin : end; SPREAD: of every row the columns k of its expert m.

    CHECKED: only rows whose id is `own`, or one of whose SLOTS ids is. EACH: rows of small for one of wide.
    """
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        valid = rows < end
        if perm_ptr is not None:
            rows = tl.load(perm_ptr + rows, mask=valid, other=0).to(tl.int32)
        if CHECKED and SLOTS > 1:
            valid = valid & names(index_ptr + (rows // divisor).to(tl.int64) * SLOTS, own, valid, EXPERTS, SLOTS)
        elif CHECKED or SPREAD:
            ids = tl.load(index_ptr + rows // divisor, mask=valid, other=-1)
            if CHECKED:
                valid = valid & (ids == own)
            else:
                valid = valid & (ids >= 0) & (ids < EXPERTS)
        live = k_ok[:, None] & valid[None, :]
        if SPREAD:
            live = live & (m[:, None] == ids[None, :])
        long = rows.to(tl.int64)
        small = tl.load(small_ptr + (long * SMALL_STRIDE)[None, :] + k[:, None], mask=live, other=0.0).to(DOT)
        if EACH > 1:
            long = long // EACH
        inside = valid[:, None]
        if C % BLOCK_C != 0:
            inside = inside & (cols < C)[None, :]
        wide = tl.load(wide_ptr + (long * WIDE_STRIDE)[:, None] + cols[None, :], mask=inside, other=0.0).to(DOT)
        if keys_ptr is not None:
            key0 = tl.load(keys_ptr + long * 2, mask=valid, other=0).to(tl.uint32, bitcast=True)
            key1 = tl.load(keys_ptr + long * 2 + 1, mask=valid, other=0).to(tl.uint32, bitcast=True)
            wide = drop_tile(wide, key0, key1, cols, threshold)
        acc = tl.dot(small, wide, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _side(
    program, small_ptr, wide_ptr, index_ptr, perm_ptr, edges_ptr, keys_ptr, plane_ptr, grad_ptr, k0, cols,
    num_rows, batch, span, divisor, share, splits, threshold, scale,
    R: tl.constexpr, RP: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, K_STRIDE: tl.constexpr,
    C_STRIDE: tl.constexpr, SMALL_STRIDE: tl.constexpr, WIDE_STRIDE: tl.constexpr,
    MODE: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    SLOTS: tl.constexpr, SLOT: tl.constexpr, EACH: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One block of features, narrow columns k0 : k0 + RP of R, of split `program` (and expert, where sorted)."""
    W: tl.constexpr = PADDED * RP
    SPREAD: tl.constexpr = MODE == "tokens"
    GATED: tl.constexpr = MODE == "gated"
    # The id of a bank of one says which rows are wrong.
    CHECKED: tl.constexpr = MODE == "all" and index_ptr is not None
    WIDE: tl.constexpr = "ieee" if PRECISION == "tf32x3" and W > 128 else PRECISION
    column = tl.arange(0, W)
    m = column // RP
    k = k0 + column % RP
    # Without a comparison that is always true, whose vectors would be narrower.
    k_ok = m < EXPERTS
    if R % RP != 0:
        k_ok = k_ok & (k < R)
    to = (k * K_STRIDE)[:, None] + (cols * C_STRIDE)[None, :]
    mask = k_ok[:, None] & (cols < C)[None, :]
    zeros = tl.zeros([W, BLOCK_C], tl.float32)
    if MODE == "samples":
        at = program // WINDOW * WINDOW + tl.arange(0, WINDOW)
        own = tl.load(index_ptr + program)
        mine = tl.load(index_ptr + at, mask=at < batch, other=-1) == own
        first = tl.sum((mine & (at < program)).to(tl.int32), 0)
        if (own >= 0) & (own < EXPERTS) & (first % share == 0):
            count = tl.sum(mine.to(tl.int32), 0)
            number = tl.cumsum(mine.to(tl.int32), 0) - 1
            acc = zeros
            for n in range(first, tl.minimum(first + share, count)):
                begin = tl.sum(tl.where(mine & (number == n), at, 0), 0) * span
                acc = _products(
                    acc, begin, begin + span, own, small_ptr, wide_ptr, None, None, keys_ptr, divisor, threshold,
                    m, k, k_ok, cols, SMALL_STRIDE, WIDE_STRIDE, C, EXPERTS, False, False,
                    BLOCK_M, BLOCK_C, STAGES, WIDE, DOT, SLOTS, EACH,
                )  # fmt: skip
            acc *= scale
            if (batch <= WINDOW) & (count <= share):
                tl.store(grad_ptr + own.to(tl.int64) * SIZE + to, narrow(acc, grad_ptr.dtype.element_ty), mask=mask)
            else:
                plane = plane_of(program, own, first, share, EXPERTS, WINDOW).to(tl.int64)
                tl.store(plane_ptr + plane * SIZE + to, acc, mask=mask)
    else:
        own = program * 0
        plane = program
        if MODE == "sorted":
            own = program % EXPERTS
            split = program // EXPERTS
            begin = tl.load(edges_ptr + own).to(tl.int32)
            end = tl.load(edges_ptr + own + 1).to(tl.int32)
            count = tl.cdiv(tl.cdiv(end - begin, BLOCK_M), splits) * BLOCK_M
            begin += split * count
            end = tl.minimum(begin + count, end)
        elif MODE == "parts":
            parts = tl.cdiv(span, share)
            sample = program // parts
            begin = sample * span + (program % parts) * share
            end = tl.minimum(begin + share, (sample + 1) * span)
        else:
            begin = program * share
            end = tl.minimum(begin + share, num_rows)
        source = k
        if GATED:
            source = m * SLOT + k
        acc = _products(
            zeros, begin, end, own, small_ptr, wide_ptr, index_ptr, perm_ptr, keys_ptr, divisor, threshold,
            m, source, k_ok, cols, SMALL_STRIDE, WIDE_STRIDE, C, EXPERTS, CHECKED, SPREAD,
            BLOCK_M, BLOCK_C, STAGES, WIDE, DOT, SLOTS, EACH,
        )  # fmt: skip
        if SPREAD or GATED:
            plane *= EXPERTS
            to += (m * SIZE)[:, None]
        if SPREAD or (GATED and index_ptr is not None):  # noqa: SIM102
            if tl.max(tl.reshape((acc != acc).to(tl.int32), [W * BLOCK_C], can_reorder=True), 0) > 0:
                # What is not finite in one expert's rows reached others as 0 * inf: one product for each expert.
                for own in range(EXPERTS):
                    only = _products(
                        zeros, begin, end, own, small_ptr, wide_ptr, index_ptr, perm_ptr, keys_ptr, divisor, threshold,
                        m, source, k_ok & (m == own), cols, SMALL_STRIDE, WIDE_STRIDE, C, EXPERTS, True, False,
                        BLOCK_M, BLOCK_C, 1, WIDE, DOT, SLOTS, EACH,
                    )  # fmt: skip
                    acc = tl.where((m == own)[:, None], only, acc)
        tl.store(plane_ptr + plane.to(tl.int64) * SIZE + to, narrow(acc * scale, plane_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "num_rows", "batch", "span", "threshold",
        "a_divisor", "a_share", "a_splits", "a_programs", "b_divisor", "b_share", "b_splits",
    ]
)  # fmt: skip
def lora_grads_kernel(
    x_ptr, grad_ptr, dt_ptr, t_ptr, a_index_ptr, a_perm_ptr, a_edges_ptr, b_index_ptr, b_perm_ptr, b_edges_ptr,
    keys_ptr, a_plane_ptr, b_plane_ptr, da_ptr, db_ptr, num_rows, batch, span,
    a_divisor, a_share, a_splits, a_programs, b_divisor, b_share, b_splits, threshold, inv_keep, scaling,
    K: tl.constexpr, RANK: tl.constexpr, NG: tl.constexpr, WIDTH: tl.constexpr, OFFSETS: tl.constexpr,
    A_MODE: tl.constexpr, A_EXPERTS: tl.constexpr, A_PADDED: tl.constexpr, A_RP: tl.constexpr,
    B_MODE: tl.constexpr, B_EXPERTS: tl.constexpr, B_PADDED: tl.constexpr, B_RP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    SLOTS: tl.constexpr, EACH: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid (programs of A, then of B); the blocks of a split's features follow each other."""
    GROUPS: tl.constexpr = len(OFFSETS)
    R: tl.constexpr = GROUPS * RANK
    program = tl.program_id(0)
    if a_plane_ptr is not None:  # noqa: SIM102
        if program < a_programs:
            A_COLUMNS: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
            A_BLOCKS: tl.constexpr = A_COLUMNS * ((R + A_RP - 1) // A_RP)
            block = program % A_BLOCKS
            _side(
                program // A_BLOCKS, dt_ptr, x_ptr, a_index_ptr, a_perm_ptr, a_edges_ptr, keys_ptr, a_plane_ptr,
                da_ptr, (block // A_COLUMNS) * A_RP, (block % A_COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C),
                num_rows, batch, span, a_divisor, a_share, a_splits, threshold, inv_keep,
                R, A_RP, K, R * K, K, 1, R * (A_EXPERTS if A_MODE == "gated" else 1), K, A_MODE, A_EXPERTS, A_PADDED,
                BLOCK_M, BLOCK_C, STAGES, PRECISION, DOT, SLOTS, R, EACH, WINDOW,
            )  # fmt: skip
    if b_plane_ptr is not None:  # noqa: SIM102
        if program >= a_programs:
            B_COLUMNS: tl.constexpr = (NG + BLOCK_C - 1) // BLOCK_C
            CHUNKS: tl.constexpr = (RANK + B_RP - 1) // B_RP
            B_BLOCKS: tl.constexpr = GROUPS * B_COLUMNS * CHUNKS
            block = (program - a_programs) % B_BLOCKS
            group = block // (B_COLUMNS * CHUNKS)
            offset = 0
            for g in tl.static_range(GROUPS):
                offset = tl.where(group == g, OFFSETS[g], offset)
            _side(
                (program - a_programs) // B_BLOCKS, t_ptr + group * RANK, grad_ptr + offset,
                b_index_ptr, b_perm_ptr, b_edges_ptr, None, b_plane_ptr + group * (NG * RANK),
                None if db_ptr is None else db_ptr + group * (NG * RANK),
                (block // B_COLUMNS % CHUNKS) * B_RP, (block % B_COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C),
                num_rows, batch, span, b_divisor, b_share, b_splits, 0, scaling,
                RANK, B_RP, NG, GROUPS * NG * RANK, 1, RANK, R * (B_EXPERTS if B_MODE == "gated" else 1), WIDTH,
                B_MODE, B_EXPERTS, B_PADDED, BLOCK_M, BLOCK_C, STAGES, PRECISION, DOT, SLOTS, R, EACH, WINDOW,
            )  # fmt: skip
