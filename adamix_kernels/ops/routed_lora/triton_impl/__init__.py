"""Triton backend of routed LoRA: one launch forward, at most three backward (two where one split is enough).

Where a tile's rows differ in expert and all experts are too wide to be multiplied at once, the rows are sorted
by expert on the device first.
"""

from __future__ import annotations

import torch

from ...._triton_utils import launch, memory
from ...._triton_utils import problem as unsupported
from ..._passes import by_pass
from ..._triton_plans import Planned
from .aot import aot_cases
from .forward import lora_forward_kernel
from .input_grad import lora_dx_kernel
from .plan import SUM_BLOCK, gaps, make_plan
from .weight_grad import lora_grads_kernel, lora_sum_kernel

__all__ = ["aot_cases", "backward", "direct", "forward", "unsupported"]


def forward(x, lora_a, lora_b, a_index, b_index, base, seed, scaling, groups, offsets, dropout_p, inplace=False):
    batch, tokens, _ = x.shape
    per_group = lora_b.shape[1] // groups
    width = max(offsets) + per_group if base is None else base.shape[2]
    # In place a program reads and writes each element once, and the columns of no group are left alone.
    out = base if inplace else memory(x, batch, tokens, width)
    t = memory(x, batch, tokens, lora_a.shape[1])
    if batch * tokens == 0:
        return out, t
    plan = make_plan(*x.shape[:2], lora_a, lora_b, a_index, b_index, offsets, width)
    meta, grid = plan.tiles("lora_forward_kernel", plan.a_wide, width)
    launch(
        lora_forward_kernel, grid, x.device,
        x.contiguous(), lora_a.contiguous(), lora_b.contiguous(), plan.a_index, plan.b_index,
        None if base is None else base.contiguous(), seed, plan.perm, out, t,
        *plan.scalars(dropout_p, scaling), GAPS=() if inplace else gaps(offsets, per_group, width), **meta,
    )  # fmt: skip
    return out, t


def backward(
    grad_out, x, t, lora_a, lora_b, a_index, b_index, seed,
    need_x, need_a, need_b, scaling, groups, offsets, dropout_p,
):  # fmt: skip
    needed = ((x, need_x), (lora_a, need_a), (lora_b, need_b))
    grads = [memory(x, *(like.shape if wanted else (0,))) for like, wanted in needed]
    if x.shape[0] * x.shape[1] == 0:
        return tuple(grad.zero_() for grad in grads)
    plan = make_plan(*x.shape[:2], lora_a, lora_b, a_index, b_index, offsets, grad_out.shape[2])
    dx, da, db = (grad if wanted else None for grad, (_, wanted) in zip(grads, needed, strict=True))
    grad_out, x, t, lora_a, lora_b = (z.contiguous() for z in (grad_out, x, t, lora_a, lora_b))
    scalars = plan.scalars(dropout_p, scaling)
    dt = None
    if need_x or need_a:
        dt = memory(t, *t.shape)
        meta, grid = plan.tiles("lora_dx_kernel", plan.b_wide, x.shape[2] if need_x else 1)
        launch(
            lora_dx_kernel, grid, x.device,
            grad_out, lora_a, lora_b, plan.a_index, plan.b_index, seed, plan.perm, dx, dt, *scalars, **meta,
        )  # fmt: skip
    if need_a or need_b:
        _weight_grads(x, grad_out, dt, t, seed, da, db, scalars, plan)
    return tuple(grads)


def _weight_grads(x, grad_out, dt, t, seed, da, db, scalars, plan):
    """Fills da and db; None for one that is not needed."""
    meta, grid, split_tiles = plan.grads(da is not None, db is not None)
    splits = grid[1]
    planes = da, db
    if splits > 1:
        planes = [None if d is None else memory(d, splits, *d.shape, dtype=torch.float32) for d in (da, db)]
    launch(
        lora_grads_kernel, grid, x.device,
        x, grad_out, dt, t, plan.a_index, plan.b_index, seed, plan.perm, *planes, split_tiles, *scalars, **meta,
    )  # fmt: skip
    if splits > 1:
        sizes = [0 if d is None else d.numel() for d in (da, db)]
        blocks = sum(-(-size // SUM_BLOCK) for size in sizes)
        launch(
            lora_sum_kernel, (blocks,), x.device, *planes, da, db, *sizes, splits, BLOCK=SUM_BLOCK, num_warps=4
        )  # fmt: skip


def _forward_in_place(*arguments):
    return forward(*arguments, inplace=True)[1:]


class _Direct:
    """Calls without a device-side sort, past the dispatcher and Triton's JIT."""

    def __init__(self) -> None:
        self._forward = Planned(by_pass(forward, 0, 5), 7)
        self._in_place = Planned(by_pass(_forward_in_place, 0, 5), 7)
        self.backward = Planned(by_pass(backward, 0, 1, 2), 8)

    def find(self, inplace, *arguments):
        return (self._in_place if inplace else self._forward).find(*arguments)

    def make(self, inplace, *arguments):
        return (self._in_place if inplace else self._forward).make(*arguments)


direct = _Direct()
