"""The launch of the backward that reads dy once (grad_out_pass.py), where ops/_one_read.py says so."""

from __future__ import annotations

from typing import Any

import torch

from ...._triton_utils import dot_dtype, launch, memory
from ..._one_read import RANK, ROWS, WARPS, columns, programs_of, tiles_a_program
from .grad_out_pass import lora_grad_out_pass_kernel
from .plan import Call

STAGES = 3


def tiles_of(call: Call, device: torch.device) -> int:
    """Tiles a program takes; 0 where dy is read twice: of groups, of columns without any, and by _one_read's rules."""
    sizes = call.sizes
    if len(sizes["OFFSETS"]) > 1 or sizes["WIDTH"] != sizes["NG"]:
        return 0
    return tiles_a_program(call.plan, device, call.dtype.itemsize, sizes["RANK"], sizes["K"], sizes["NG"])


def read_once(call: Call, share: int, grad_out, t, lora_a, lora_b, seed, dx, dt, keys, need_b, scalars):
    """Fills dx, dt and keys, which may be None; dB's float32 planes [programs, 1, Ng, r], None unless need_b."""
    sizes, plan = call.sizes, call.plan
    programs = programs_of(plan, share)
    planes = memory(t, programs, *lora_b.shape, dtype=torch.float32) if need_b else None
    launch(
        lora_grad_out_pass_kernel, (programs,), t.device,
        grad_out, t, lora_a, lora_b, plan.down.index, plan.up.index, seed, dx, dt, keys, planes,
        plan.batch, *scalars, share,
        K=sizes["K"], NG=sizes["NG"], R=sizes["RANK"], A_EXPERTS=plan.down.experts,
        **constants(sizes["K"], sizes["NG"], call.dtype),
    )  # fmt: skip
    return planes


def constants(k: int, per_group: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel's block sizes and compile options."""
    return dict(
        RP=RANK, DOT=dot_dtype(dtype), BLOCK_M=ROWS, PARTS=WARPS, A_COLS=columns(k), B_COLS=columns(per_group),
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
