"""Triton backend of routed LoRA: one launch forward, at most three backward (two where one split is enough).

Where a tile's rows differ in expert and all experts are too wide to be multiplied at once, the rows are sorted
by expert on the device first.
"""

from __future__ import annotations

import torch

from ...._triton_utils import current_stream, launch, memory
from ...._triton_utils import problem as unsupported
from ..._passes import by_pass
from ..._triton_plans import Planned
from .aot import aot_cases
from .forward import lora_forward_kernel
from .input_grad import lora_dx_kernel
from .one_read import read_once, tiles_of
from .plan import gaps, make_call
from .weights import weight_grads

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
    call = make_call(*x.shape[:2], lora_a, lora_b, a_index, b_index, offsets, width)
    meta, grid, order = call.tiles("lora_forward_kernel", per_group)
    launch(
        lora_forward_kernel, grid, x.device,
        x.contiguous(), lora_a.contiguous(), lora_b.contiguous(), call.plan.down.index, call.plan.up.index,
        None if base is None else base.contiguous(), seed, out, t, *order, *call.scalars(dropout_p, scaling),
        GAPS=() if inplace else gaps(offsets, per_group, width), **meta,
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
    call = make_call(*x.shape[:2], lora_a, lora_b, a_index, b_index, offsets, grad_out.shape[2])
    dx, da, db = (grad if wanted else None for grad, (_, wanted) in zip(grads, needed, strict=True))
    grad_out, x, t, lora_a, lora_b = (z.contiguous() for z in (grad_out, x, t, lora_a, lora_b))
    scalars = call.scalars(dropout_p, scaling)
    dt = keys = b_planes = None
    share = tiles_of(call, x.device)
    if need_x or need_a or share:
        dt = memory(t, *t.shape)
        if need_a and seed is not None:
            # A row's keys of the mask, which each block of features would compute anew.
            keys = memory(x, call.rows, 2, dtype=torch.int32)
    if share:
        b_planes = read_once(call, share, grad_out, t, lora_a, lora_b, seed, dx, dt, keys, need_b, scalars)
    elif need_x or need_a:
        meta, grid, order = call.tiles("lora_dx_kernel", x.shape[2] if need_x else 1)
        launch(
            lora_dx_kernel, grid, x.device,
            grad_out, lora_a, lora_b, call.plan.down.index, call.plan.up.index, seed, dx, dt, keys, *order,
            *scalars, **meta,
        )  # fmt: skip
    if need_a or need_b:
        weight_grads(x, grad_out, dt, t, keys, da, db, *scalars[3:], call, b_planes)
    return tuple(grads)


def _forward_in_place(*arguments):
    return forward(*arguments, inplace=True)[1:]


class _Direct:
    """Calls without a device-side sort, past the dispatcher and Triton's JIT."""

    has_node, current_stream = True, staticmethod(current_stream)

    def __init__(self) -> None:
        self._forward = Planned(by_pass(forward, 0, 5), 7)
        self._in_place = Planned(by_pass(_forward_in_place, 0, 5), 7)
        self.backward = Planned(by_pass(backward, 0, 1, 2), 8)

    def find(self, inplace, *arguments):
        return (self._in_place if inplace else self._forward).find(*arguments)

    def make(self, inplace, *arguments):
        return (self._in_place if inplace else self._forward).make(*arguments)


direct = _Direct()
