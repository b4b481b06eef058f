"""Third launch of the backward: the float32 planes of weight_grad.py summed first to last and rounded once."""

import triton
import triton.language as tl

from ...._triton_utils import narrow

# Most samples of a split (weights.MAX_SAMPLES), a power of two.
_SAMPLES = tl.constexpr(16)


@triton.jit
def _sum_planes(
    plane_ptr, out_ptr, index_ptr, block, batch, share, splits,
    SIZE: tl.constexpr, MODE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Elements of one expert; a plane that holds nothing of it is not read."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    m = block // BLOCKS
    at = (block % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, AHEAD):
        for ahead in tl.static_range(AHEAD):
            split = start + ahead
            used = split < splits
            plane = split * EXPERTS + m
            if MODE == "parts":
                # share: splits of a sample.
                used = used & (tl.load(index_ptr + split // share, mask=used, other=-1) == m)
                plane = split
            elif MODE == "samples":
                sample = split * share + tl.arange(0, _SAMPLES)
                mine = (tl.arange(0, _SAMPLES) < share) & (sample < batch)
                ids = tl.load(index_ptr + sample, mask=mine, other=-1)
                used = used & (tl.max((ids == m).to(tl.int32), 0) > 0)
            acc += tl.load(plane_ptr + plane.to(tl.int64) * SIZE + at, mask=inside & used, other=0.0)
    tl.store(out_ptr + m.to(tl.int64) * SIZE + at, narrow(acc, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "a_share", "a_splits", "a_programs", "b_share", "b_splits"])
def lora_sum_kernel(
    a_plane_ptr, b_plane_ptr, a_index_ptr, b_index_ptr, da_ptr, db_ptr,
    batch, a_share, a_splits, a_programs, b_share, b_splits,
    A_SIZE: tl.constexpr, A_MODE: tl.constexpr, A_EXPERTS: tl.constexpr,
    B_SIZE: tl.constexpr, B_MODE: tl.constexpr, B_EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of dA, then of dB); a side without planes has none. sizes in elements of an expert."""
    program = tl.program_id(0)
    if a_plane_ptr is not None:  # noqa: SIM102
        if program < a_programs:
            _sum_planes(
                a_plane_ptr,
                da_ptr,
                a_index_ptr,
                program,
                batch,
                a_share,
                a_splits,
                A_SIZE,
                A_MODE,
                A_EXPERTS,
                BLOCK,
                AHEAD,
            )
    if b_plane_ptr is not None:  # noqa: SIM102
        if program >= a_programs:
            _sum_planes(
                b_plane_ptr, db_ptr, b_index_ptr, program - a_programs, batch, b_share, b_splits,
                B_SIZE, B_MODE, B_EXPERTS, BLOCK, AHEAD,
            )  # fmt: skip
