"""Kernels of the weighted mean of banks and of its gradients.

Traffic: forward every bank once and the result once, (M + 1) elements for each merged one; backward the
gradient once, then each bank once where scores learn and each bank's gradient once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton_utils import narrow


@triton.jit
def shares(scores, scored, experts, PADDED: tl.constexpr, WIDE: tl.constexpr):
    """exp(scores - max) [PADDED], 0 behind the last expert; 1 for each expert where not scored."""
    m = tl.arange(0, PADDED)
    live = m < experts
    share = live.to(WIDE)
    if scores is not None:
        s = tl.load(scores + m, mask=live & scored, other=0.0).to(WIDE)
        s = tl.where(live, s, -float("inf"))
        share = tl.exp(s - tl.max(s))
    return share


@triton.jit
def divide(x, y, WIDE: tl.constexpr):
    """x / y to nearest: the plain quotient of float32 may miss by two units."""
    if WIDE == tl.float64:  # noqa: SIM300
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _merge_block(
    bank, out, share, size, experts, block,
    PADDED: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements block * BLOCK : + BLOCK of out; experts are added in their order, UNROLL loads in flight."""
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    m = tl.arange(0, PADDED)
    acc = tl.zeros([BLOCK], WIDE)
    for first in range(0, experts, UNROLL):
        for step in tl.static_range(UNROLL):
            expert = first + step
            here = inside & (expert < experts)
            x = tl.load(bank + expert * size + at, mask=here, other=0.0).to(WIDE)
            acc += x * tl.sum(tl.where(m == expert, share, 0.0))
    acc = divide(acc, tl.sum(share), WIDE)
    tl.store(out + at, narrow(acc.to(tl.float32), out.dtype.element_ty), mask=inside)


@triton.jit
def merge_experts_kernel(
    bank, scores, out, size, experts,
    PADDED: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sum over m of softmax(scores)[m] * bank[m]; size: elements of one expert."""
    share = shares(scores, True, experts, PADDED, WIDE)
    _merge_block(bank, out, share, tl.cast(size, tl.int64), experts, tl.program_id(0), PADDED, UNROLL, WIDE, BLOCK)


@triton.jit(do_not_specialize=["banks"])
def merge_banks_kernel(
    table, anchor, results, score_anchor, banks,
    BANKS: tl.constexpr, PADDED: tl.constexpr, UNROLL: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """merge_experts_kernel for the bank that this program falls in.

    table [8, banks] int64: first program, elements from the anchor to the bank, from results to the result,
    whether scored, elements from the other anchor to the scores, elements of one expert, experts, and whether
    all three counts of elements are multiples of UNIT, which is 16 bytes.
    """
    program = tl.program_id(0)
    n = tl.arange(0, BANKS)
    first = tl.load(table + n, mask=n < banks, other=0x7FFFFFFFFFFFFFFF)
    row = table + tl.sum((first <= program).to(tl.int32)) - 1
    block = program - tl.load(row)
    bank = tl.load(row + banks)
    out = tl.load(row + 2 * banks)
    size = tl.load(row + 5 * banks)
    experts = tl.load(row + 6 * banks)
    share = shares(
        score_anchor + tl.load(row + 4 * banks), tl.load(row + 3 * banks) != 0, experts, PADDED, WIDE
    )  # fmt: skip
    if tl.load(row + 7 * banks) != 0:
        # The products tell the compiler that wide loads are aligned.
        _merge_block(
            anchor + bank // UNIT * UNIT, results + out // UNIT * UNIT, share, size // UNIT * UNIT, experts, block,
            PADDED, UNROLL, WIDE, BLOCK,
        )  # fmt: skip
    else:
        _merge_block(anchor + bank, results + out, share, size, experts, block, PADDED, 1, WIDE, BLOCK)


@triton.jit
def merge_experts_grad_kernel(
    grad, bank, scores, bank_grad, plane, size, experts,
    PADDED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bank_grad[m] = softmax(scores)[m] * grad; plane [programs, PADDED]: a program's part of sum(bank[m] * grad)."""
    m = tl.arange(0, PADDED)
    share = shares(scores, True, experts, PADDED, WIDE)
    share = divide(share, tl.sum(share), WIDE)
    dots = tl.zeros([PADDED, BLOCK], WIDE)
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(grad + at, mask=inside, other=0.0).to(WIDE)[None, :]
        mask = inside[None, :] & (m < experts)[:, None]
        to = m.to(tl.int64)[:, None] * size + at[None, :]
        if bank_grad is not None:
            value = (share[:, None] * g).to(tl.float32)
            tl.store(bank_grad + to, narrow(value, bank_grad.dtype.element_ty), mask=mask)
        if plane is not None:
            dots += tl.load(bank + to, mask=mask, other=0.0).to(WIDE) * g
    if plane is not None:
        tl.store(plane + tl.program_id(0) * PADDED + m, tl.sum(dots, axis=1))


@triton.jit(do_not_specialize=["programs"])
def merge_scores_grad_kernel(
    plane, scores, scores_grad, programs, experts,
    PADDED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """scores_grad = share * (dots - sum(share * dots)), dots the sum of plane's rows in a fixed order."""
    m = tl.arange(0, PADDED)
    acc = tl.zeros([ROWS, PADDED], WIDE)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        acc += tl.load(plane + row[:, None] * PADDED + m[None, :], mask=(row < programs)[:, None], other=0.0)
    dots = tl.sum(acc, axis=0)
    share = shares(scores, True, experts, PADDED, WIDE)
    share = divide(share, tl.sum(share), WIDE)
    value = share * (dots - tl.sum(share * dots))
    dtype: tl.constexpr = scores_grad.dtype.element_ty
    # A float64 keeps its digits, all else is rounded from float32.
    if dtype == tl.float64:
        tl.store(scores_grad + m, value, mask=m < experts)
    else:
        tl.store(scores_grad + m, narrow(value.to(tl.float32), dtype), mask=m < experts)
