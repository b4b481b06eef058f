"""Where a row's columns lie in memory, and what is loaded of them, in float32.

A row begins anywhere: `head` columns lie before its first 16-byte boundary, `whole` ones in full steps behind it, as
many in every row, up to a step in the rest, and what is left of the head and of the end in the edge, a column a lane.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span(at, phase, V, COLS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """(head, whole, columns in steps and rest); unless ALIGNED rows are taken from their first column on."""
    head = 0
    whole = V // COLS * COLS
    if ALIGNED:
        head = (-(at + phase) & (VECTOR - 1)).to(tl.int32)
        whole = (V - (VECTOR - 1)) // COLS * COLS
    return head, whole, tl.minimum((V - head) // VECTOR * VECTOR, whole + COLS)


@triton.jit
def first_vector(x, at, ALIGNED: tl.constexpr):
    """x + at, a 16-byte boundary if ALIGNED."""
    first = x + at
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first


@triton.jit
def tile(COLS: tl.constexpr, VECTOR: tl.constexpr):
    return (tl.arange(0, COLS // VECTOR) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]


@triton.jit
def load_words(first, start, mask, COLS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """[lanes, VECTOR] from column `start` on; -inf where not mask [lanes, 1], which is None or of lanes. Two 16-bit
    logits are one word, [lanes, VECTOR / 2]: half the registers, and two instructions widen both."""
    LANES: tl.constexpr = COLS // VECTOR
    if ALIGNED and first.dtype.element_ty.primitive_bitwidth == 16:
        words = first.to(tl.pointer_type(tl.int32), bitcast=True) + start // 2
        off = (tl.arange(0, LANES) * (VECTOR // 2))[:, None] + tl.arange(0, VECTOR // 2)[None, :]
        if mask is None:
            x = tl.load(words + off)
        elif first.dtype.element_ty == tl.bfloat16:
            # -inf twice
            x = tl.load(words + off, mask=mask, other=-8323200)
        else:
            x = tl.load(words + off, mask=mask, other=-67044352)
    else:
        off = tile(COLS, VECTOR)
        if mask is None:
            x = tl.load(first + start + off)
        else:
            x = tl.load(first + start + off, mask=mask, other=-float("inf"))
    return x


@triton.jit
def load_kept(
    first, whole, in_rest, HELD: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, REST: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """(a row's first HELD steps in words, [lanes, steps, VECTOR / 2], or a number; its rest). In this order Triton
    gives a thread all of its lane's. There are as many steps as a power of two; those beyond HELD take no registers."""
    held = 0
    if HELD > 0:
        number = tl.arange(0, triton.next_power_of_2(HELD))[None, :, None]
        words = first.to(tl.pointer_type(tl.int32), bitcast=True) + number * (COLS // 2)
        held = tl.load(words + tile(COLS // 2, VECTOR // 2)[:, None, :], mask=number < HELD, other=0)
    return held, load_words(first, whole, in_rest, COLS // VECTOR * REST, REST, ALIGNED)


@triton.jit
def held_step(held, number: tl.constexpr):
    """One of those steps, [lanes, VECTOR / 2]. Which others are 0 is known to the compiler, so that it adds nothing."""
    return tl.sum(tl.where((tl.arange(0, held.shape[1]) == number)[None, :, None], held, 0), axis=1)


@triton.jit
def first_step(
    first, held, whole, HELD: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """A row's first step, [lanes, VECTOR] in float32; -inf where there is none."""
    if HELD > 0:
        x = held_step(held, 0)
    else:
        x = load_words(first, 0, before(0, whole, COLS // VECTOR, VECTOR), COLS, VECTOR, ALIGNED)
    return widened(x, first.dtype.element_ty)


@triton.jit
def widened(x, DTYPE: tl.constexpr, nothing=0):
    """What load_words found, of DTYPE, in float32. nothing: 0 or `unknown_zero`, taken in by what widens bfloat16."""
    if x.dtype == tl.int32:
        if DTYPE == tl.bfloat16:  # noqa: SIM300 (DTYPE is no constant here)
            low = ((x << 16) + nothing).to(tl.float32, bitcast=True)
            high = ((x & -65536) | nothing).to(tl.float32, bitcast=True)
        else:
            x = x | nothing
            low = x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x = tl.interleave(low, high)
    return x.to(tl.float32)


@triton.jit
def unknown_zero(n):
    """0, by way of n, which is never negative. No compiler knows, so that nothing is widened with it before n is there,
    and what one pass has widened is not kept in registers for the next."""
    return n >> 31


@triton.jit
def load_tile(first, start, COLS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """One step, [lanes, VECTOR] in float32."""
    return widened(load_words(first, start, None, COLS, VECTOR, ALIGNED), first.dtype.element_ty)


@triton.jit
def before(start, end, LANES: tl.constexpr, EACH: tl.constexpr):
    """[lanes, 1]: whose columns from `start` on, EACH a lane, lie before `end`."""
    return (start + tl.arange(0, LANES) * EACH < end)[:, None]


@triton.jit
def edge_columns(head, vectors, V, COLS: tl.constexpr, VECTOR: tl.constexpr):
    """(columns, which of them there are), [lanes, 1] both."""
    lane = tl.arange(0, COLS // VECTOR)[:, None]
    return tl.where(lane < head, lane, vectors + lane), lane < V - vectors
