"""Second launch of the backward: gradients of both banks and both biases, by split.

An expert's tokens are split into equal parts; each (expert, split, block of features) writes its own float32 plane,
zero where there is no token, and the planes are summed in a fixed order. No atomics: the same bits every time.
Traffic: x and dy once, dpre and h [N, r] once for every block of features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import activate, narrow


@triton.jit
def _accumulate(
    acc, sums, g, z, rows, valid, c,
    C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    ACTIVATION: tl.constexpr, PART: tl.constexpr, ONES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Over the tile's rows: acc [COLS, RP] += z^T g; for PART "up" also sums += z's, for "bias" sums += g's alone.

    A tile is used in registers or by an asynchronous dot, not both: Triton's pipeliner then has a copy overwrite what
    the dot still reads. So z is summed by a dot with ONES, and g by a program of its own.
    """
    k = tl.arange(0, RP)
    rows = rows.to(tl.int64)[:, None]
    g_mask = valid[:, None] & (k < R)[None, :]
    g_tile = tl.load(g + rows * R + k[None, :], mask=g_mask, other=0.0)
    if PART == "bias":
        sums += tl.sum(g_tile.to(tl.float32), axis=0)
    else:
        z_mask = valid[:, None]
        if C == 0 or C % COLS != 0:
            z_mask = z_mask & (c < C)[None, :]
        z_tile = tl.load(z + rows * C + c[None, :], mask=z_mask, other=0.0).to(DOT)
        if ACTIVATION != "":
            g_tile = narrow(activate(g_tile.to(tl.float32), ACTIVATION), g.dtype.element_ty)
        acc = tl.dot(tl.trans(z_tile), g_tile.to(DOT), acc, input_precision=PRECISION)
        if PART == "up":
            if ONES:
                sums = tl.dot(tl.trans(z_tile), tl.full([z_tile.shape[0], 16], 1.0, DOT), sums)
            else:
                sums += tl.sum(z_tile.to(tl.float32), axis=0)
    return acc, sums


@triton.jit
def _own_samples(index, m, batch, span, div, tiles, split, splits, CHUNK: tl.constexpr):
    """The split's share of expert m's tiles [begin, end), and of its samples: the first, the end, the first's number.

    Tiles and samples of the expert are numbered in their order; so all splits have the same work, whoever is chosen.
    """
    count = 0
    for start in range(0, batch, CHUNK):
        b = start + tl.arange(0, CHUNK)
        count += tl.sum((tl.load(index + b * span // div, mask=b < batch, other=-1) == m).to(tl.int32), axis=0)
    share = tl.cdiv(count * tiles, splits)
    begin = tl.minimum(split * share, count * tiles)
    end = tl.minimum(begin + share, count * tiles)
    number = begin // tiles
    first, stop, before = 0, 0, 0
    for start in range(0, batch, CHUNK):
        b = start + tl.arange(0, CHUNK)
        mine = (tl.load(index + b * span // div, mask=b < batch, other=-1) == m).to(tl.int32)
        upto = before + tl.cumsum(mine, axis=0)
        first += tl.sum(((upto <= number) & (b < batch)).to(tl.int32), axis=0)
        stop += tl.sum(((upto * tiles < end) & (b < batch)).to(tl.int32), axis=0)
        before += tl.sum(mine, axis=0)
    return begin, end, first, tl.minimum(stop + 1, batch), number


@triton.jit
def _plane(
    g, z, index, perm, edges, plane, bias_plane, batch, span, div, split, splits, m, block,
    C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, M: tl.constexpr, MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr, PART: tl.constexpr, ONES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Expert m's gradient from one split of the tokens, features block * COLS : + COLS, or its bias's alone."""
    c = block * COLS + tl.arange(0, COLS)
    k = tl.arange(0, RP)
    acc = tl.zeros([COLS, RP], tl.float32)
    if PART == "bias":
        sums = tl.zeros([RP], tl.float32)
    elif ONES:
        sums = tl.zeros([COLS, 16], tl.float32)
    else:
        sums = tl.zeros([COLS], tl.float32)
    if perm is not None:
        begin = tl.load(edges + m)
        end = tl.load(edges + m + 1)
        share = tl.cdiv(tl.cdiv(end - begin, ROWS), splits) * ROWS
        begin += split * share
        end = tl.minimum(begin + share, end)
        for start in range(begin, end, ROWS):
            at = start + tl.arange(0, ROWS)
            rows = tl.load(perm + at, mask=at < end, other=0).to(tl.int32)
            acc, sums = _accumulate(
                acc, sums, g, z, rows, at < end, c, C, R, RP, ACTIVATION, PART, ONES, DOT, PRECISION, COLS
            )
    else:
        tiles = tl.cdiv(span, ROWS)
        if index is None or MASKED:
            # One span: all rows.
            share = tl.cdiv(tiles, splits)
            begin = split * share
            end = tl.minimum(begin + share, tiles)
            first, stop, number = 0, 1, 0
        else:
            begin, end, first, stop, number = _own_samples(index, m, batch, span, div, tiles, split, splits, 128)
        for b in range(first, stop):
            # The expert's tiles before this sample. In the address, not in the inner loop's bounds alone: what only
            # those need Triton 3.6 takes for unused, and drops it from the outer loop (triton-lang/triton#9036).
            ahead = number * tiles
            low = tl.maximum(begin, ahead)
            high = tl.minimum(end, ahead + tiles)
            if index is not None and not MASKED:
                mine = tl.load(index + (b * span) // div) == m
                high = tl.where(mine, high, low)
                number += mine.to(tl.int32)
            for tile in range(low, high):
                offset = (tile - ahead) * ROWS + tl.arange(0, ROWS)
                rows = b * span + offset
                valid = offset < span
                if MASKED:
                    valid = valid & (tl.load(index + rows // div, mask=valid, other=-1) == m)
                acc, sums = _accumulate(
                    acc, sums, g, z, rows, valid, c, C, R, RP, ACTIVATION, PART, ONES, DOT, PRECISION, COLS
                )

    at = (split * M + m).to(tl.int64)
    if PART == "bias":
        tl.store(bias_plane + at * R + k, narrow(sums, bias_plane.dtype.element_ty), mask=k < R)
    else:
        mask = (c < C)[:, None] & (k < R)[None, :]
        to = plane + at * (R * C) + c[:, None] + k[None, :] * C
        if PART == "up":
            to = plane + at * (R * C) + c[:, None] * R + k[None, :]
            if ONES:
                # Every column holds the same sums.
                sums = tl.max(sums, axis=1)
            tl.store(bias_plane + at * C + c, narrow(sums, bias_plane.dtype.element_ty), mask=c < C)
        tl.store(to, narrow(acc, plane.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "down_batch",
        "down_span",
        "down_div",
        "up_batch",
        "up_span",
        "up_div",
        "down_splits",
        "up_splits",
    ]
)
def adapter_weight_grad_kernel(
    x, dpre, grad_out, h, down_index, down_perm, down_edges, up_index, up_perm, up_edges,
    down_plane, down_bias_plane, up_plane, up_bias_plane,
    down_batch, down_span, down_div, up_batch, up_span, up_div, down_splits, up_splits,
    H: tl.constexpr, O: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,  # noqa: E741
    MD: tl.constexpr, MASK_D: tl.constexpr, MU: tl.constexpr, MASK_U: tl.constexpr,
    ACTIVATION: tl.constexpr, ONES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Planes of dWd = dpre^T x, dbd = sum dpre, dWu = dy^T act(h), dbu = sum dy, each over an expert's tokens.

    h is act(pre), and ACTIVATION "", where an earlier launch has made it; else pre.
    """
    program = tl.program_id(0)
    # Of the down side one program more, for the bias.
    down_blocks: tl.constexpr = (H + COLS - 1) // COLS + 1
    up_blocks: tl.constexpr = (O + COLS - 1) // COLS if O > 0 else 1
    down_programs = 0
    if down_plane is not None:
        down_programs = MD * down_blocks * down_splits
        if program < down_programs:
            split = program // (MD * down_blocks)
            m = program // down_blocks % MD
            block = program % down_blocks
            if block < down_blocks - 1:
                _plane(
                    dpre, x, down_index, down_perm, down_edges, down_plane, down_bias_plane,
                    down_batch, down_span, down_div, split, down_splits, m, block,
                    H, R, RP, MD, MASK_D, "", "down", ONES, DOT, PRECISION, ROWS, COLS,
                )  # fmt: skip
            else:
                _plane(
                    dpre, x, down_index, down_perm, down_edges, down_plane, down_bias_plane,
                    down_batch, down_span, down_div, split, down_splits, m, 0,
                    H, R, RP, MD, MASK_D, "", "bias", ONES, DOT, PRECISION, ROWS, COLS,
                )  # fmt: skip
    if up_plane is not None:  # noqa: SIM102
        if program >= down_programs:
            program -= down_programs
            _plane(
                h, grad_out, up_index, up_perm, up_edges, up_plane, up_bias_plane,
                up_batch, up_span, up_div, program // (MU * up_blocks), up_splits,
                program // up_blocks % MU, program % up_blocks,
                O, R, RP, MU, MASK_U, ACTIVATION, "up", ONES, DOT, PRECISION, ROWS, COLS,
            )  # fmt: skip
