"""Device functions of the mixture: x through A and the router at once, and the gates of a tile's rows in registers.

A tile of experts is [ROWS, PADDED], an expert's value in its column; `per_column` has it for each narrow column.
"""

import triton
import triton.language as tl

from ...._triton_utils import narrow
from ..._gated_tiles import times
from ...routed_lora.triton_impl.tiles import drop_tile


@triton.jit
def shrink_beside(
    z_ptrs, valid, columns, live, router, key0, key1, threshold,
    C: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """(z @ the bank's columns, with the mask where DROPOUT, float32 [BLOCK_M, WIDTH]; z @ router [EXPERTS, C]^T without
    it, float32 [BLOCK_M, PADDED]), one pass over z [BLOCK_M, C]."""
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    logits = tl.zeros([BLOCK_M, PADDED], tl.float32)
    m = tl.arange(0, PADDED)
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK_C)
        z_mask = valid[:, None]
        w_mask = live[None, :]
        r_mask = (m < EXPERTS)[None, :]
        if C % BLOCK_C != 0:
            z_mask = z_mask & (c < C)[None, :]
            w_mask = w_mask & (c < C)[:, None]
            r_mask = r_mask & (c < C)[:, None]
        z = tl.load(z_ptrs[:, None] + c[None, :], mask=z_mask, other=0.0).to(DOT)
        w = tl.load(columns[None, :] + c[:, None], mask=w_mask, other=0.0).to(DOT)
        r = tl.load(router + m[None, :] * C + c[:, None], mask=r_mask, other=0.0)
        if router.dtype.element_ty != z_ptrs.dtype.element_ty:
            r = narrow(r, z_ptrs.dtype.element_ty)
        logits = tl.dot(z, r.to(DOT), logits, input_precision=PRECISION)
        if DROPOUT:
            z = drop_tile(z, key0, key1, c, threshold)
        acc = tl.dot(z, w, acc, input_precision=PRECISION)
    return acc, logits


@triton.jit
def all_gates(logits, EXPERTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """softmax of every row [ROWS, PADDED], 0 beyond EXPERTS."""
    value = tl.where((tl.arange(0, PADDED) < EXPERTS)[None, :], logits, -float("inf"))
    share = tl.exp(value - tl.max(value, axis=1)[:, None])
    return tl.div_rn(share, tl.broadcast_to(tl.sum(share, axis=1)[:, None], [ROWS, PADDED]))


@triton.jit
def chosen_gates(logits, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """(the gates of the TOP_K largest of every row, in which slot they are), -1 in both for an expert that is none.

    As the router chooses: of equal ones the lower id is the larger; a NaN ranks as infinity does.
    """
    m = tl.arange(0, PADDED)
    rank = tl.where(logits != logits, float("inf"), logits)
    free = tl.broadcast_to((m < EXPERTS)[None, :], [ROWS, PADDED])
    slots = tl.full([ROWS, PADDED], -1, tl.int32)
    for s in tl.static_range(TOP_K):
        top = tl.max(tl.where(free, rank, -float("inf")), axis=1)
        one = tl.min(tl.where(free & (rank == top[:, None]), m[None, :], PADDED), axis=1)
        chosen = m[None, :] == one[:, None]
        slots = tl.where(chosen, s, slots)
        free = free & ~chosen
    value = tl.where(slots >= 0, logits, -float("inf"))
    share = tl.where(slots >= 0, tl.exp(value - tl.max(value, axis=1)[:, None]), 0.0)
    share = tl.div_rn(share, tl.broadcast_to(tl.sum(share, axis=1)[:, None], [ROWS, PADDED]))
    return tl.where(slots >= 0, share, -1.0), slots


@triton.jit
def first_columns(z, PADDED: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, PADDED] -> [ROWS, MP]."""
    if PADDED == MP:
        return z
    else:
        HALF: tl.constexpr = PADDED // 2
        left, _ = tl.split(tl.permute(tl.reshape(z, [ROWS, 2, HALF]), (0, 2, 1)))
        return first_columns(left, HALF, MP, ROWS)


@triton.jit
def per_column(z, PADDED: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, PADDED] -> [ROWS, MP * RP]: an expert's value in each of its columns."""
    own = first_columns(z, PADDED, MP, ROWS)
    return tl.reshape(tl.broadcast_to(own[:, :, None], [ROWS, MP, RP]), [ROWS, MP * RP])


@triton.jit
def weigh(
    wide, gates, TOP_K: tl.constexpr, PADDED: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr
):
    """[ROWS, MP * RP] with each expert's columns times its gate [ROWS, PADDED]; 0 where that is -1."""
    gate = per_column(gates, PADDED, RP, MP, ROWS)
    if TOP_K == 0:
        return times(wide, gate)
    else:
        return tl.where(gate == -1.0, 0.0, times(wide, gate))
