"""When the backward reads dy once (grad_out_pass.py), and the launch that does: decided by shapes and the GPU alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...._triton_utils import capability, dot_dtype, launch, memory
from ..._routed_plan import Plan, power_of_2
from ..._row_tiles import KEEPS
from .grad_out_pass import adapter_grad_out_pass_kernel

# Programs on GPUs whose multiprocessors hold one of 112 KB: no more than there are multiprocessors.
PROGRAMS = {80: 108, 90: 128, 100: 144}
# Fewest rows of a program: its plane, written and read, costs as much as dy's second read of some 50 rows.
MIN_ROWS = 128
# Columns of an expert; features: those of dWu that 8 warps hold in registers, and that fill a product of each.
RANK, MOST, FEWEST = 16, 1024, 128
ROWS, WARPS, STAGES = 16, 8, 2


class UpPlanes(NamedTuple):
    """The up side's float32 planes, written by the launch that read dy: [programs, 1, H, R] and [programs, 1, H]."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    programs: int


def tiles_a_program(plan: Plan, like: torch.Tensor, hidden: int, width: int, rank: int) -> int:
    """Tiles of ROWS tokens that a program of the launch takes; 0 where dy is read twice."""
    programs = PROGRAMS.get(capability(like.device), 0)
    masked = plan.down.masked or plan.up.masked or plan.key is not None or plan.up.experts > 1
    fits = hidden == width and hidden % 8 == 0 and FEWEST <= power_of_2(hidden) <= MOST and 0 < rank <= RANK
    if not KEEPS or masked or not fits or like.element_size() != 2 or plan.batch * plan.span < MIN_ROWS * programs:
        return 0
    return programs and -(-plan.batch * -(-plan.span // ROWS) // programs)


def read_once(plan: Plan, share: int, grad_out, pre, up_weight, down_weight, dpre, dx, need_up, **options):
    """Fills dpre and dx, which may be None; the up side's planes, None unless need_up."""
    (_, rank, hidden), like = down_weight.shape, grad_out
    programs = -(-plan.batch * -(-plan.span // ROWS) // share)
    planes = UpPlanes(None, None, programs)
    if need_up:
        weight = memory(like, programs, *up_weight.shape, dtype=torch.float32)
        planes = UpPlanes(weight, memory(like, programs, *up_weight.shape[:2], dtype=torch.float32), programs)
    launch(
        adapter_grad_out_pass_kernel, (programs,), like.device,
        grad_out, pre, up_weight, down_weight, plan.up.index, plan.down.index, dpre, dx, planes.weight, planes.bias,
        plan.batch, plan.span, plan.down.div, plan.up.div, share,
        H=hidden, R=rank, MD=plan.down.experts, **constants(hidden, like.dtype), **options,
    )  # fmt: skip
    return planes


def constants(hidden: int, dtype: torch.dtype) -> dict[str, object]:
    """The kernel's block sizes and compile options."""
    padded = power_of_2(hidden)
    return dict(
        RP=RANK, DOT=dot_dtype(dtype), ROWS=ROWS, PARTS=WARPS, COLS=padded // WARPS,
        ABREAST=min(ROWS, WARPS * 256 // padded), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
