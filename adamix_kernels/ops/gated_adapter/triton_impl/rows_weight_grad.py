"""Gradients of both banks and both biases from rows grouped by expert, and of gates by sample.

An expert's rows are split into equal parts; each (expert, split, block of features) writes its own float32 plane, zero
where there is no row, and the planes are summed in a fixed order. No atomics: the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow
from ..._gated_sum import sum_sample


@triton.jit
def _plane(
    g, z, weights, perm, edges, plane, bias_plane, num_rows, split, splits, m, block,
    C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, M: tl.constexpr, PART: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Expert m's gradient from one split of its rows, features block * COLS : + COLS: for PART "up" with its bias's,
    for "bias" its bias's alone.
    """
    c = block * COLS + tl.arange(0, COLS)
    k = tl.arange(0, RP)
    e = tl.arange(0, 16)
    acc = tl.zeros([COLS, RP], tl.float32)
    if PART == "bias":
        sums = tl.zeros([RP], tl.float32)
    else:
        sums = tl.zeros([COLS, 16], tl.float32)
    if perm is not None:
        begin = tl.load(edges + m).to(tl.int32)
        end = tl.load(edges + m + 1).to(tl.int32)
    else:
        begin, end = 0, num_rows
    share = tl.cdiv(tl.cdiv(end - begin, ROWS), splits) * ROWS
    begin += split * share
    end = tl.minimum(begin + share, end)
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        valid = rows < end
        if perm is not None:
            rows = tl.load(perm + rows, mask=valid, other=0).to(tl.int32)
        row = rows.to(tl.int64)[:, None]
        g_tile = tl.load(g + row * R + k[None, :], mask=valid[:, None] & (k < R)[None, :], other=0.0)
        if PART == "bias":
            sums += tl.sum(g_tile.to(tl.float32), axis=0)
        else:
            own = row
            if M > 1 and K > 0:
                own = row // K
            z_mask = valid[:, None]
            if C == 0 or C % COLS != 0:
                z_mask = z_mask & (c < C)[None, :]
            z_tile = tl.load(z + own * C + c[None, :], mask=z_mask, other=0.0).to(DOT)
            acc = tl.dot(tl.trans(z_tile), g_tile.to(DOT), acc, input_precision=PRECISION)
            if PART == "up":
                # A tile is used by dots alone; the row's weight is the first of 16 columns.
                w_tile = tl.load(weights + row + e[None, :] * 0, mask=valid[:, None] & (e == 0)[None, :], other=0.0)
                sums = tl.dot(tl.trans(z_tile), w_tile.to(DOT), sums, input_precision=PRECISION)
    at = (split * M + m).to(tl.int64)
    if PART == "bias":
        tl.store(bias_plane + at * R + k, narrow(sums, bias_plane.dtype.element_ty), mask=k < R)
    else:
        to = plane + at * (R * C) + c[:, None] + k[None, :] * C
        if PART == "up":
            to = plane + at * (R * C) + c[:, None] * R + k[None, :]
            bias_to = bias_plane + at * C + c[:, None] + e[None, :] * 0
            sums = narrow(sums, bias_plane.dtype.element_ty)
            tl.store(bias_to, sums, mask=(c < C)[:, None] & (e == 0)[None, :])
        tl.store(to, narrow(acc, plane.dtype.element_ty), mask=(c < C)[:, None] & (k < R)[None, :])


@triton.jit(do_not_specialize=["num_rows", "div", "down_splits", "up_splits"])
def gated_adapter_rows_weight_grad_kernel(
    x, dpre, grad_out, h, weights, down_perm, down_edges, up_perm, up_edges, row_grads,
    down_plane, down_bias_plane, up_plane, up_bias_plane, dgates, num_rows, div, down_splits, up_splits,
    H: tl.constexpr, O: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,  # noqa: E741
    K: tl.constexpr, KP: tl.constexpr, MD: tl.constexpr, MU: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Planes of dWd = dpre^T x, dbd = sum dpre, dWu = dy^T h and dbu = dy^T weights, each over an expert's rows (those
    of x, num_rows, where the bank holds one); of gates by sample the sum of row_grads [., K].
    """
    program = tl.program_id(0)
    # Of the down side one program more, for the bias.
    down_blocks: tl.constexpr = (H + COLS - 1) // COLS + 1
    up_blocks: tl.constexpr = (O + COLS - 1) // COLS if O > 0 else 1
    down_programs, up_programs = 0, 0
    if down_plane is not None:
        down_programs = MD * down_blocks * down_splits
        if program < down_programs:
            split, m, block = program // (MD * down_blocks), program // down_blocks % MD, program % down_blocks
            if block < down_blocks - 1:
                _plane(
                    dpre, x, None, down_perm, down_edges, down_plane, down_bias_plane, num_rows, split, down_splits,
                    m, block, H, R, RP, K, MD, "down", DOT, PRECISION, ROWS, COLS,
                )  # fmt: skip
            else:
                _plane(
                    dpre, x, None, down_perm, down_edges, down_plane, down_bias_plane, num_rows, split, down_splits,
                    m, 0, H, R, RP, K, MD, "bias", DOT, PRECISION, ROWS, COLS,
                )  # fmt: skip
    if up_plane is not None:
        up_programs = MU * up_blocks * up_splits
        if program >= down_programs and program < down_programs + up_programs:
            own = program - down_programs
            _plane(
                h, grad_out, weights, up_perm, up_edges, up_plane, up_bias_plane, num_rows,
                own // (MU * up_blocks), up_splits, own // up_blocks % MU, own % up_blocks,
                O, R, RP, K, MU, "up", DOT, PRECISION, ROWS, COLS,
            )  # fmt: skip
    if row_grads is not None:  # noqa: SIM102
        if program >= down_programs + up_programs:
            sum_sample(row_grads, dgates, program - down_programs - up_programs, div, K, KP, CHUNK)
