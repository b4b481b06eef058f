"""Third launch of the backward: the float32 planes of weight_grad.py summed first to last and rounded once."""

import triton
import triton.language as tl

from ...._triton_utils import narrow

# Planes of samples asked for at once.
_AHEAD = tl.constexpr(8)


@triton.jit
def plane_of(b, m, number, share, EXPERTS: tl.constexpr, WINDOW: tl.constexpr):
    """The plane of expert m's samples number : number + share of a window of WINDOW, the first of them sample b.

    Planes of few experts follow each other; elsewhere a window has a plane for each of its samples.
    """
    shares = tl.cdiv(WINDOW, share)
    return tl.where(EXPERTS * shares < WINDOW, (b // WINDOW * EXPERTS + m) * shares + number // share, b)


@triton.jit
def _sum_planes(
    plane_ptr, out_ptr, index_ptr, block, batch, share, splits,
    SIZE: tl.constexpr, MODE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Elements of one expert; a plane that holds nothing of it is not read.

    Of samples, what is written already stays: the gradient of an expert whose samples one program summed.
    """
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    m = block // BLOCKS
    at = (block % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    acc = tl.zeros([BLOCK], tl.float32)
    if MODE == "samples":
        count = 0
        for start in range(0, batch, WINDOW):
            b = start + tl.arange(0, WINDOW)
            mine = tl.load(index_ptr + b, mask=b < batch, other=-1) == m
            count = tl.sum(mine.to(tl.int32), 0)
            if (batch > WINDOW) | (count > share):
                number = tl.cumsum(mine.to(tl.int32), 0) - 1
                for n in range(0, count, share * _AHEAD):
                    for ahead in tl.static_range(_AHEAD):
                        ordinal = n + ahead * share
                        sample = tl.sum(tl.where(mine & (number == ordinal), b, 0), 0)
                        plane = plane_of(sample, m, ordinal, share, EXPERTS, WINDOW).to(tl.int64)
                        used = inside & (ordinal < count)
                        acc += tl.load(plane_ptr + plane * SIZE + at, mask=used, other=0.0)
        inside = inside & ((batch > WINDOW) | (count > share) | (count == 0))
    else:
        for start in range(0, splits, AHEAD):
            for ahead in tl.static_range(AHEAD):
                split = start + ahead
                used = split < splits
                plane = split * EXPERTS + m
                if MODE == "parts":
                    # share: splits of a sample.
                    used = used & (tl.load(index_ptr + split // share, mask=used, other=-1) == m)
                    plane = split
                acc += tl.load(plane_ptr + plane.to(tl.int64) * SIZE + at, mask=inside & used, other=0.0)
    tl.store(out_ptr + m.to(tl.int64) * SIZE + at, narrow(acc, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "a_share", "a_splits", "a_programs", "b_share", "b_splits"])
def lora_sum_kernel(
    a_plane_ptr, b_plane_ptr, a_index_ptr, b_index_ptr, da_ptr, db_ptr,
    batch, a_share, a_splits, a_programs, b_share, b_splits,
    A_SIZE: tl.constexpr, A_MODE: tl.constexpr, A_EXPERTS: tl.constexpr,
    B_SIZE: tl.constexpr, B_MODE: tl.constexpr, B_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of dA, then of dB); a side without planes has none. sizes in elements of an expert."""
    program = tl.program_id(0)
    if a_plane_ptr is not None:  # noqa: SIM102
        if program < a_programs:
            _sum_planes(
                a_plane_ptr, da_ptr, a_index_ptr, program, batch, a_share, a_splits, A_SIZE, A_MODE, A_EXPERTS, BLOCK,
                AHEAD, WINDOW,
            )  # fmt: skip
    if b_plane_ptr is not None:  # noqa: SIM102
        if program >= a_programs:
            _sum_planes(
                b_plane_ptr, db_ptr, b_index_ptr, program - a_programs, batch, b_share, b_splits,
                B_SIZE, B_MODE, B_EXPERTS, BLOCK, AHEAD, WINDOW,
            )  # fmt: skip
