"""Triton backend of the routed adapter.

Launches: one forward, at most three backward (two where one split of the tokens is enough); a per-token
routing over more than 256 narrow columns adds the device-side sort of the rows.
"""

from __future__ import annotations

from typing import Any

import torch

from ...._triton_utils import capability, current_stream, dot_dtype, launch, memory, precision
from ...._triton_utils import problem as unsupported
from ..._one_read import tiles_a_program
from ..._passes import by_pass
from ..._routed_plan import Plan, group_rows, make_plan
from ..._routed_plan import widest as most
from ..._triton_plans import Planned
from ..._triton_tables import Config
from .forward import adapter_forward_kernel
from .input_grad import adapter_input_grad_kernel
from .one_read import read_once
from .tables import row_tile, tile_options
from .weights import weight_grads

__all__ = ["backward", "direct", "forward", "most", "unsupported"]


def forward(x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual, add_input, activation):
    (batch, tokens, hidden), (md, r, _), (mu, width, _) = x.shape, down_weight.shape, up_weight.shape
    x, down_weight, up_weight = x.contiguous(), down_weight.contiguous(), up_weight.contiguous()
    out, pre = memory(x, batch, tokens, width), memory(x, batch, tokens, r)
    if batch * tokens == 0:
        return out, pre
    plan = make_plan(batch, tokens, r, down_index, up_index, md, mu)
    tile, keep = _row_tile("adapter_forward_kernel", plan, x, hidden, add_input and not plan.up.masked)
    groups = group_rows(plan, tile.rows)
    launch(
        adapter_forward_kernel, (groups.tiles,), x.device,
        x, down_weight, _contiguous(down_bias), up_weight, _contiguous(up_bias), plan.down.index, plan.up.index,
        x if add_input else _contiguous(residual), out, pre, groups.perm, groups.start, groups.stop,
        plan.span, plan.down.div, plan.up.div,
        **_tile_meta(plan, tile, keep, x.dtype), H=hidden, O=width, R=r, ACTIVATION=activation,
    )  # fmt: skip
    return out, pre


def backward(
    grad_out,
    x,
    pre,
    down_weight,
    up_weight,
    down_index,
    up_index,
    need_input,
    need_down,
    need_up,
    add_input,
    activation,
):
    grad_out, x, pre = grad_out.contiguous(), x.contiguous(), pre.contiguous()
    down_weight, up_weight = down_weight.contiguous(), up_weight.contiguous()
    dx = memory(x, *x.shape) if need_input else None
    dpre = memory(x, *pre.shape) if need_down else None
    h, rest, up_planes = pre, activation, None
    plan = make_plan(*x.shape[:2], pre.shape[2], down_index, up_index, down_weight.shape[0], up_weight.shape[0])
    alike = x.shape[2] == grad_out.shape[2]
    share = tiles_a_program(plan, x.device, x.element_size(), pre.shape[2], *x.shape[2:]) if alike else 0
    if share:
        up_planes = read_once(
            plan, share, grad_out, pre, up_weight, down_weight, dpre, dx, need_up,
            ADD_GRAD=add_input, ACTIVATION=activation,
        )  # fmt: skip
    elif x.shape[0] * x.shape[1] and (need_input or need_down):
        h = memory(x, *pre.shape) if need_up else None
        _input_grad(plan, grad_out, pre, down_weight, up_weight, dpre, h, dx, add_input, activation)
        rest = ""
    grads = weight_grads(
        x,
        dpre,
        grad_out,
        pre if h is None else h,
        down_index,
        up_index,
        down_weight.shape,
        up_weight.shape,
        need_up,
        rest,
        up_planes,
    )
    return memory(x, 0) if dx is None else dx, *grads


def _input_grad(plan, grad_out, pre, down_weight, up_weight, dpre, h, dx, add_input, activation):
    width, (_, r, hidden) = grad_out.shape[2], down_weight.shape
    # Also where no dx is wanted: the same bits of all else.
    tile, keep = _row_tile("adapter_input_grad_kernel", plan, pre, width, add_input and not plan.down.masked)
    groups = group_rows(plan, tile.rows)
    launch(
        adapter_input_grad_kernel, (groups.tiles,), pre.device,
        grad_out, pre, up_weight, down_weight, plan.up.index, plan.down.index, dpre, h, dx,
        groups.perm, groups.start, groups.stop, plan.span, plan.down.div, plan.up.div,
        **_tile_meta(plan, tile, keep, pre.dtype), H=hidden, O=width, R=r, ACTIVATION=activation, ADD_GRAD=add_input,
    )  # fmt: skip


def _row_tile(kernel: str, plan: Plan, like: torch.Tensor, hidden: int, stays: bool) -> tuple[Config, bool]:
    return row_tile(kernel, capability(like.device), like.element_size(), plan.width, hidden, stays)


def _tile_meta(plan: Plan, tile: Config, keep: bool, dtype: torch.dtype) -> dict[str, Any]:
    return dict(
        RP=plan.rp,
        MD=plan.down.experts,
        MDP=plan.down.padded,
        MASK_D=plan.down.masked,
        MU=plan.up.experts,
        MUP=plan.up.padded,
        MASK_U=plan.up.masked,
        DOT=dot_dtype(dtype),
        PRECISION=precision(dtype),
        **tile_options(tile, keep, dtype.itemsize, plan.width, plan.down.masked or plan.up.masked),
    )


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


class _Direct:
    """Calls without a device-side sort, past the dispatcher and Triton's JIT."""

    has_node, current_stream = True, staticmethod(current_stream)

    def __init__(self) -> None:
        planned = Planned(by_pass(forward, 0, 7), 8)
        self.find, self.make = planned.find, planned.make
        self.backward = Planned(by_pass(backward, 0, 1, 2), 7)


direct = _Direct()
