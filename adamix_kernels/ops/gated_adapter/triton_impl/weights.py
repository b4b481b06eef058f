"""Launches of the weight gradients: planes over a split of the rows, then their sum; and of gates by sample."""

from __future__ import annotations

import torch

from ...._triton_utils import capability, dot_dtype, launch, memory, precision
from ..._adapter_planes import count_splits, sum_planes
from ..._gated_sum import CHUNK
from ..._routed_plan import power_of_2
from .plan import Plan
from .tables import config
from .weight_grad import gated_adapter_weight_grad_kernel

# Planes of all experts hold at most this part of what they sum: with more the launches take no less time.
PLANES = 6


def weight_grads(plan: Plan, x, dpre, grad_out, h, weights, row_grads, dgates, down_shape, up_shape):
    """(dWd, dbd, dWu, dbu): a side's pair is empty tensors where dpre or h is None. row_grads: None, or summed to
    dgates.
    """
    (md, r, hidden), (mu, width, _) = down_shape, up_shape
    need = (dpre is not None, h is not None)
    down, up = outputs(x, down_shape, need[0]), outputs(x, up_shape, need[1])
    if not any(need) and row_grads is None:
        return *down, *up
    widths = [max(16, power_of_2(m * r)) for m in (md, mu)]
    wide = max([w for w, wanted in zip(widths, need) if wanted], default=16)
    chosen = config("gated_adapter_weight_grad_kernel", capability(x.device), x.element_size(), wide)
    # A side of no features still has its bias.
    blocks = [max(1, -(-n // chosen.cols)) for n in (hidden, width)]
    features = sum(b for b, wanted in zip(blocks, need) if wanted)
    columns = sum(m * r for m, wanted in zip((md, mu), need) if wanted)
    row_bytes = sum(need) * x.element_size()
    splits = count_splits(plan.rows, max(1, features), chosen.rows, columns, row_bytes, PLANES)
    planes = [t if splits == 1 else memory(x, splits, *t.shape, dtype=torch.float32) for t in (*down, *up)]
    samples = 0 if row_grads is None else plan.rows // plan.div
    programs = need[0] * (-(-hidden // chosen.cols) + 1) * splits + need[1] * blocks[1] * splits + samples
    absent = [None, None]
    launch(
        gated_adapter_weight_grad_kernel, (programs,), x.device,
        x, dpre, grad_out, h, weights, plan.down.index, plan.up.index, row_grads,
        *(planes[:2] if need[0] else absent), *(planes[2:] if need[1] else absent),
        None if row_grads is None else dgates, plan.rows, plan.div, splits, splits,
        H=hidden, O=width, R=r, K=plan.slots, KP=power_of_2(plan.slots),
        MD=md, DOWN=plan.down.kind, DOWN_WIDTH=widths[0], MU=mu, UP=plan.up.kind, UP_WIDTH=widths[1],
        GP=plan.biases, DOT=dot_dtype(x.dtype), PRECISION=precision(x.dtype),
        ROWS=chosen.rows, COLS=chosen.cols, CHUNK=CHUNK,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    sum_planes(x, planes, (*down, *up), splits, splits)
    return *down, *up


def outputs(x: torch.Tensor, shape: torch.Size, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A bank's and its bias's gradient, not yet written; empty where it is not wanted."""
    return (memory(x, *shape), memory(x, *shape[:2])) if wanted else (memory(x, 0), memory(x, 0))
