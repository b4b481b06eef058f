"""Device functions of gates, on a tile of rows and the narrow columns of all experts (ops/_routed_tiles.py).

A row's gates and ids are SLOTS numbers from at * SLOTS on. Without an index gates are dense: slot m is expert m.
"""

import triton
import triton.language as tl


@triton.jit
def weigh(z, gates, index, scales, at, valid, M: tl.constexpr, SLOTS: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr):
    """z [ROWS, MP * RP] times the gate of each column's expert, and its scale; 0 where no slot names that expert."""
    m = (tl.arange(0, MP * RP) // RP)[None, :]
    if index is None:
        g = tl.load(gates + (at * SLOTS)[:, None] + m, mask=valid[:, None] & (m < M), other=0.0).to(tl.float32)
        if scales is not None:
            g *= tl.load(scales + m, mask=m < M, other=0.0)
        return z * g
    else:
        out = tl.zeros_like(z)
        for slot in tl.static_range(SLOTS):
            g = tl.load(gates + at * SLOTS + slot, mask=valid, other=0.0).to(tl.float32)
            ids = tl.load(index + at * SLOTS + slot, mask=valid, other=-1)
            if scales is not None:
                g *= tl.load(scales + ids, mask=(ids >= 0) & (ids < M), other=0.0)
            out = tl.where(ids[:, None] == m, out + z * g[:, None], out)
        return out


@triton.jit
def copies(own, RP: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, RP] -> [ROWS, MP * RP]: a row's values in the columns of every expert."""
    if MP == 1:
        return own
    else:
        return tl.reshape(tl.broadcast_to(own[:, None, :], [ROWS, MP, RP]), [ROWS, MP * RP])


@triton.jit
def sums(wide, RP: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, MP * RP] -> [ROWS, MP]: over each expert's columns."""
    return tl.sum(tl.reshape(wide, [ROWS, MP, RP]), axis=2)


@triton.jit
def store_slots(
    ptrs, z, index, at, valid, M: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, RP: tl.constexpr,
    MP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Columns of z [ROWS, MP * RP] to ptrs [ROWS], R of each slot; of a bank of one (not MASKED) its expert's."""
    m = (tl.arange(0, MP * RP) // RP)[None, :]
    k = (tl.arange(0, MP * RP) % RP)[None, :]
    if index is None or not MASKED:
        tl.store(ptrs[:, None] + m * R + k, z, mask=valid[:, None] & (m < M) & (k < R))
    else:
        for slot in tl.static_range(SLOTS):
            ids = tl.load(index + at * SLOTS + slot, mask=valid, other=-1)
            tl.store(ptrs[:, None] + slot * R + k, z, mask=(ids[:, None] == m) & (k < R))


@triton.jit
def load_slots(
    ptrs, index, at, valid, M: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, RP: tl.constexpr,
    MP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What `store_slots` stored, in float32; 0 in the columns of experts that no slot names."""
    m = (tl.arange(0, MP * RP) // RP)[None, :]
    k = (tl.arange(0, MP * RP) % RP)[None, :]
    if index is None or not MASKED:
        z = tl.load(ptrs[:, None] + m * R + k, mask=valid[:, None] & (m < M) & (k < R), other=0.0)
    else:
        slots = tl.zeros_like(m) - 1
        for slot in tl.static_range(SLOTS):
            ids = tl.load(index + at * SLOTS + slot, mask=valid, other=-1)
            slots = tl.where(ids[:, None] == m, slot, slots)
        z = tl.load(ptrs[:, None] + slots * R + k, mask=(slots >= 0) & (k < R), other=0.0)
    return z.to(tl.float32)


@triton.jit
def slot_of(each, index, scales, at, valid, slot, M: tl.constexpr, SLOTS: tl.constexpr, MP: tl.constexpr):
    """[ROWS]: of each [ROWS, MP] the value of the expert that this slot names, times its scale."""
    ids = tl.load(index + at * SLOTS + slot, mask=valid, other=-1)
    value = tl.sum(tl.where(ids[:, None] == tl.arange(0, MP)[None, :], each, 0.0), axis=1)
    if scales is not None:
        value *= tl.load(scales + ids, mask=(ids >= 0) & (ids < M), other=0.0)
    return value
