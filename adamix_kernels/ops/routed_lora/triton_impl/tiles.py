"""Device functions of the routed LoRA kernels: the dropout mask, a tile of rows through A and through B.

The narrow side of a tile is that of ops/_routed_tiles.py. A has groups * r columns to an expert, k = g * r + j; of B
one group's columns at a time are live among the same. `K0` is where the columns that a program holds begin: all of
them, or MAX_RANK at a time.
"""

import triton
import triton.language as tl

from ...._triton_utils import INTERPRETING, narrow
from ..._routed_tiles import bank_columns, poison

_INTERPRETING = tl.constexpr(INTERPRETING)
# Of two 16-bit elements in a register, those whose hash is below the bound become zero.
_DROP_PAIR = tl.constexpr("""{
    .reg .pred low, high;
    setp.lt.u32 low, $2, $4;
    setp.lt.u32 high, $3, $5;
    mov.b32 $0, $1;
    @low and.b32 $0, $0, 0xffff0000;
    @high and.b32 $0, $0, 0x0000ffff;
}""")


@triton.jit
def _fmix32(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def row_keys(seed_ptr, rows):
    """key0 | 1, key1 of ops/_dropout.py: uint32 [BLOCK_M] for int32 rows [BLOCK_M], whose high half is zero."""
    seed = tl.load(seed_ptr)
    lo = seed.to(tl.uint32)
    hi = (seed >> 32).to(tl.uint32)
    row = rows.to(tl.uint32)
    a = _fmix32(_fmix32(lo + 0x9E3779B9) ^ hi)
    b = _fmix32(_fmix32(hi + 0x7F4A7C15) ^ lo)
    key0 = _fmix32(_fmix32(a ^ row)) | 1
    key1 = _fmix32(_fmix32(b + row))
    return key0, key1


@triton.jit
def _hash(key0, key1, cols):
    """h of ops/_dropout.py for rows' keys and columns: uint32 [BLOCK_M, BLOCK_C]."""
    t = cols.to(tl.uint32) * 0x9E3779B9
    return key0[:, None] * (t ^ (t * t | 1))[None, :] + key1[:, None]


@triton.jit
def keep_tile(key0, key1, cols, threshold):
    """keep_mask of ops/_dropout.py: bool [BLOCK_M, BLOCK_C].

    threshold: its signed bound, one or [BLOCK_M, 1].
    """
    return _hash(key0, key1, cols) >= (threshold.to(tl.uint32, bitcast=True) ^ 0x80000000)


@triton.jit
def drop_tile(z, key0, key1, cols, threshold):
    """z [BLOCK_M, BLOCK_C], zero where the mask drops; not scaled."""
    if _INTERPRETING or z.dtype == tl.float32:
        return tl.where(keep_tile(key0, key1, cols, threshold), z, 0.0).to(z.dtype)
    else:
        h = _hash(key0, key1, cols)
        bound = tl.full(h.shape, 0, tl.uint32) + (threshold.to(tl.uint32, bitcast=True) ^ 0x80000000)
        return tl.inline_asm_elementwise(_DROP_PAIR, "=r,r,r,r,r,r", [z, h, bound], dtype=z.dtype, is_pure=True, pack=2)


@triton.jit
def group_columns(
    bank, expert, SIZE, STRIDE, K0, K_LO, K_HI, RP: tl.constexpr, M, MP: tl.constexpr, MASKED: tl.constexpr
):
    """Pointers [MP * RP] to the first feature of the columns from K0 on, and which are of K_LO : K_HI."""
    columns, live = bank_columns(bank + K0 * STRIDE, expert, SIZE, STRIDE, K_HI - K0, RP, M, MP, MASKED)
    return columns, live & (tl.arange(0, MP * RP) % RP >= K_LO - K0)


@triton.jit
def shrink(
    acc, z_ptrs, valid, columns, live, key0, key1, threshold, STRIDE,
    C: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, W] += z [BLOCK_M, C] @ the bank's columns [C, W]; one pass over z, with the mask where DROPOUT."""
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK_C)
        z_mask = valid[:, None]
        w_mask = live[None, :]
        if C % BLOCK_C != 0:
            z_mask = z_mask & (c < C)[None, :]
            w_mask = w_mask & (c < C)[:, None]
        z = tl.load(z_ptrs[:, None] + c[None, :], mask=z_mask, other=0.0).to(DOT)
        w = tl.load(columns[None, :] + c[:, None] * STRIDE, mask=w_mask, other=0.0).to(DOT)
        if DROPOUT:
            z = drop_tile(z, key0, key1, c, threshold)
        acc = tl.dot(z, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def expand(
    t, t_ptrs, valid, wrong, expert, bank, base_ptrs, out_ptrs, key0, key1, threshold, scale, first, step,
    SIZE, K_LO: tl.constexpr, K_HI: tl.constexpr, STRIDE, FEATURE, C: tl.constexpr, DROPOUT: tl.constexpr,
    RP: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, MASKED: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    SLOTS: tl.constexpr = 1,
):  # fmt: skip
    """out [BLOCK_M, C] = base + scale * t @ the columns [C, W]^T, or its mask where DROPOUT: columns first : C : step.

    t: [BLOCK_M, MP * RP], NaN where a row is wrong; in CHUNKS it lies at t_ptrs, 0 there. Where MASKED, an infinity
    among another expert's weights reaches a row as 0 * inf: such elements keep base, and a second pass writes them.
    Gates: a row has SLOTS experts, `expert` points to the first one's id; SLOTS 0: all of them, what is NaN is so.
    """
    CAREFUL: tl.constexpr = MASKED and SLOTS > 0
    if DROPOUT:
        # A wrong row's NaN is kept everywhere.
        threshold = tl.where(wrong, -2147483648, threshold)[:, None]
    columns, live = group_columns(bank, expert, SIZE, STRIDE, 0, K_LO, K_HI, RP, M, MP, MASKED)
    # Three TF32 products hold both halves of the tile in registers: too many beyond 128 columns.
    WIDE: tl.constexpr = "ieee" if PRECISION == "tf32x3" and MP * RP > 128 else PRECISION
    spoilt = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
    for start in tl.range(first, C, step, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None]
        w_mask = live[:, None]
        if C % BLOCK_C != 0:
            mask = mask & (c < C)[None, :]
            w_mask = w_mask & (c < C)[None, :]
        if base_ptrs is not None:
            base = tl.load(base_ptrs[:, None] + c[None, :], mask=mask, other=0.0)
        if CHUNKS == 1:
            w = tl.load(columns[:, None] + c[None, :] * FEATURE, mask=w_mask, other=0.0).to(DOT)
            y = tl.dot(t, w, input_precision=WIDE)
        else:
            y = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            for chunk in tl.static_range(CHUNKS):
                if chunk * RP < K_HI and (chunk + 1) * RP > K_LO:
                    at, own = group_columns(bank, expert, SIZE, STRIDE, chunk * RP, K_LO, K_HI, RP, M, MP, MASKED)
                    k = chunk * RP + tl.arange(0, RP)
                    part = tl.load(t_ptrs[:, None] + k[None, :], mask=valid[:, None] & own[None, :], other=0.0).to(DOT)
                    own = own[:, None] & (c < C)[None, :]
                    w = tl.load(at[:, None] + c[None, :] * FEATURE, mask=own, other=0.0).to(DOT)
                    y = tl.dot(poison(part, wrong), w, y, input_precision=PRECISION)
        if CAREFUL:
            spoilt = tl.where(y == y, spoilt, 1)
            y = tl.where(y == y, y, 0.0)
        y *= scale
        if base_ptrs is not None:
            y += base.to(tl.float32)
        y = narrow(y, out_ptrs.dtype.element_ty)
        if DROPOUT:
            y = drop_tile(y, key0, key1, c, threshold)
        tl.store(out_ptrs[:, None] + c[None, :], y, mask=mask)
    if CAREFUL:  # noqa: SIM102
        if tl.max(tl.reshape(spoilt, [BLOCK_M * BLOCK_C], can_reorder=True), 0) > 0:
            _expand_spoilt(
                t, valid, wrong, expert, columns, live, base_ptrs, out_ptrs, key0, key1, threshold, scale, first, step,
                FEATURE, C, DROPOUT, RP, M, MP, BLOCK_M, BLOCK_C, WIDE, DOT, SLOTS,
            )  # fmt: skip


@triton.jit
def _expand_spoilt(
    t, valid, wrong, expert, columns, live, base_ptrs, out_ptrs, key0, key1, threshold, scale, first, step,
    FEATURE, C: tl.constexpr, DROPOUT: tl.constexpr, RP: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The elements that `expand` left, where the product of all experts is NaN: one for each expert, its rows alone."""
    POINTS: tl.constexpr = expert.dtype.is_ptr()
    m = tl.arange(0, MP * RP) // RP
    for start in range(first, C, step):
        # 16 features a step, to keep the registers few.
        for inner in range(0, BLOCK_C, 16):
            c = start + inner + tl.arange(0, 16)
            inside = (c < C)[None, :]
            y = tl.zeros([BLOCK_M, 16], tl.float32)
            spoilt = y != y
            for own in range(M):
                w = tl.load(
                    columns[:, None] + c[None, :] * FEATURE, mask=(live & (m == own))[:, None] & inside, other=0.0
                ).to(DOT)
                part = tl.dot(t, w, input_precision=PRECISION)
                spoilt = spoilt | (part != part)
                if POINTS:
                    y = tl.where(names(expert, own, valid, M, SLOTS)[:, None], y + part, y)
                else:
                    y = tl.where((expert == own)[:, None], part, y)
            if POINTS:
                y = poison(y, wrong)
                spoilt = spoilt | (y != y)
            mask = valid[:, None] & inside & spoilt
            y *= scale
            if base_ptrs is not None:
                y += tl.load(base_ptrs[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
            if DROPOUT:
                y = tl.where(keep_tile(key0, key1, c, threshold), y, 0.0)
            tl.store(out_ptrs[:, None] + c[None, :], narrow(y, out_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def names(first, own, valid, M: tl.constexpr, SLOTS: tl.constexpr):
    """[ROWS] rows one of whose SLOTS ids, from the pointers `first` on, is `own`, and none outside a bank of M."""
    found = valid != valid
    wrong = found
    for slot in tl.static_range(SLOTS):
        ids = tl.load(first + slot, mask=valid, other=-1)
        found = found | (ids == own)
        wrong = wrong | (ids < 0) | (ids >= M)
    return found & ~wrong
