"""The launch of the backward that reads dy once (grad_out_pass.py), where ops/_one_read.py says so."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...._triton_utils import dot_dtype, launch, memory
from ..._one_read import RANK, ROWS, WARPS, columns, programs_of
from ..._routed_plan import Plan
from .grad_out_pass import adapter_grad_out_pass_kernel

# dy is used in registers, too: loaded ahead by Triton it would lie in shared memory without swizzling.
STAGES = 1


class UpPlanes(NamedTuple):
    """The up side's float32 planes, written by the launch that read dy: [programs, 1, H, R] and [programs, 1, H]."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    programs: int


def read_once(plan: Plan, share: int, grad_out, pre, up_weight, down_weight, dpre, dx, need_up, **options) -> UpPlanes:
    """Fills dpre and dx, which may be None; the up side's planes, None unless need_up. share: tiles a program."""
    (_, rank, hidden), like, programs = down_weight.shape, grad_out, programs_of(plan, share)
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
    cols = columns(hidden)
    return dict(
        RP=RANK, DOT=dot_dtype(dtype), ROWS=ROWS, PARTS=WARPS, COLS=cols, ABREAST=min(ROWS, 256 // cols),
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
