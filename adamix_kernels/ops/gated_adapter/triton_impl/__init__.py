"""Triton backend of the gated adapter.

Launches: one forward, at most three backward (two where one split of the rows is enough), where a tile holds the
narrow columns of all experts; else the slots of all rows are grouped by expert on the device first (by_rows.py).
"""

from __future__ import annotations

from typing import Any

import torch

from ...._triton_utils import capability, dot_dtype, launch, memory, precision
from ...._triton_utils import problem as unsupported
from ..._gated_plans import PlannedGated
from ..._gates import slots_of
from ..._routed_plan import widest as most
from ..._row_tiles import row_tile, tile_options
from . import by_rows
from .forward import gated_adapter_forward_kernel
from .input_grad import gated_adapter_input_grad_kernel
from .plan import Plan, make_plan
from .tables import may_stay, rows_table
from .weights import outputs, weight_grads

__all__ = ["backward", "direct", "forward", "most", "unsupported"]


def forward(
    x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, gates, residual, add_input, activation, mix
):
    (batch, tokens, hidden), (md, r, _), (mu, width, _) = x.shape, down_weight.shape, up_weight.shape
    x, down_weight, up_weight = x.contiguous(), down_weight.contiguous(), up_weight.contiguous()
    out, pre = memory(x, batch, tokens, width), memory(x, batch, tokens, slots_of(down_weight, gates) * r)
    residual = x if add_input else _contiguous(residual)
    if batch * tokens == 0:
        return out, pre
    plan = make_plan(x, r, down_index, up_index, gates, md, mu, mix)
    if plan is None:
        call = by_rows.Call(x, r, down_index, up_index, gates, md, mu, mix, _activation(activation, x.dtype))
        biases = (_contiguous(down_bias), up_weight, _contiguous(up_bias))
        by_rows.forward(call, x, down_weight, *biases, residual, out, pre)
        return out, pre
    kernel = gated_adapter_forward_kernel
    meta = _tile_meta(kernel, plan, x, r, hidden, add_input and plan.up.kind != "chosen")
    launch(
        kernel, (-(-plan.rows // meta["ROWS"]),), x.device,
        x, down_weight, _contiguous(down_bias), up_weight, _contiguous(up_bias), plan.down.index, plan.up.index,
        plan.gates, residual, out, pre, plan.rows, plan.div,
        H=hidden, O=width, SAME=plan.same, ACTIVATION=_activation(activation, x.dtype), **meta,
    )  # fmt: skip
    return out, pre


def backward(
    grad_out, x, pre, down_weight, up_weight, up_bias, down_index, up_index, gates,
    need_input, need_down, need_up, need_gates, add_input, activation, mix,
):  # fmt: skip
    (batch, tokens, hidden), (md, r, _), (mu, width, _) = x.shape, down_weight.shape, up_weight.shape
    grad_out, x, pre = grad_out.contiguous(), x.contiguous(), pre.contiguous()
    down_weight, up_weight = down_weight.contiguous(), up_weight.contiguous()
    dx = memory(x, *x.shape) if need_input else memory(x, 0)
    dgates = memory(gates, *gates.shape) if need_gates else memory(gates, 0)
    if batch * tokens == 0:
        grads = (*outputs(x, down_weight.shape, need_down), *outputs(x, up_weight.shape, need_up))
        return dx, *(grad.zero_() for grad in grads), dgates.zero_()
    plan = make_plan(x, r, down_index, up_index, gates, md, mu, mix)
    if plan is None:
        call = by_rows.Call(x, r, down_index, up_index, gates, md, mu, mix, _activation(activation, x.dtype))
        wanted = (dx if need_input else None, dgates if need_gates else None)
        weights = (down_weight, up_weight, _contiguous(up_bias))
        grads = by_rows.backward(call, grad_out, x, pre, *weights, need_down, need_up, add_input, *wanted)
        return dx, *grads, dgates
    dpre = memory(x, batch, tokens, md * r) if need_down else None
    h = memory(x, batch, tokens, mu * r) if need_up else None
    weights = memory(x, plan.rows, plan.biases) if need_up else None
    by_sample = need_gates and gates.dim() == 2
    row_grads = memory(x, plan.rows, plan.slots, dtype=torch.float32) if by_sample else None
    weighs_bias = need_gates and not (plan.weights and mu == 1)
    kernel = gated_adapter_input_grad_kernel
    stays = need_input and add_input and plan.down.kind != "chosen"
    meta = _tile_meta(kernel, plan, pre, r, width, stays)
    launch(
        kernel, (-(-plan.rows // meta["ROWS"]),), x.device,
        grad_out, pre, up_weight, down_weight, _contiguous(up_bias) if weighs_bias else None,
        plan.up.index, plan.down.index, plan.gates, dpre, h, weights,
        (row_grads if by_sample else dgates) if need_gates else None, dx if need_input else None, plan.rows, plan.div,
        H=hidden, O=width, ACTIVATION=_activation(activation, x.dtype), ADD_GRAD=add_input, **meta,
    )  # fmt: skip
    grads = weight_grads(plan, x, dpre, grad_out, h, weights, row_grads, dgates, down_weight.shape, up_weight.shape)
    return dx, *grads, dgates


def _activation(activation: str, dtype: torch.dtype) -> str:
    """Every expert's columns are activated: in 16 bits by the cheaper gelu."""
    return "gelu_16" if activation == "gelu" and dtype.itemsize == 2 else activation


def _tile_meta(kernel: Any, plan: Plan, like: torch.Tensor, r: int, features: int, stays: bool) -> dict[str, Any]:
    name, size, gpu = kernel.__name__, like.element_size(), capability(like.device)
    stays = stays and may_stay(name, gpu, plan)
    tile, keep = row_tile(name, rows_table(name, plan), gpu, size, plan.width, features, stays)
    return dict(
        DOT=dot_dtype(like.dtype),
        PRECISION=precision(like.dtype),
        **plan.constants(r),
        **tile_options(tile, keep, size, plan.width, False),
    )


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


direct = PlannedGated(forward, backward, (9, 9), (5, 6))
