"""Launches where the slots of all rows are grouped by expert first: two products, and a sum of the slots' results.

A side's rows are sorted by their expert on the device, both sides at once where their ids are the same; dense gates
need no sort. Forward: at most three launches; backward: at most five. The wide results [B * S * slots, C] stand in
memory between the second product and the sum.
"""

from __future__ import annotations

from typing import Any

import torch

from ...._triton_utils import capability, dot_dtype, launch, memory, precision
from ..._adapter_planes import count_splits, sum_planes
from ..._gated_sum import CHUNK, sum_slots
from ..._routed_plan import Groups, group_tiles, power_of_2, same_ids, sort_rows
from ..._row_tiles import tile_options
from .rows import (
    gated_adapter_rows_forward_kernel,
    gated_adapter_rows_grad_kernel,
    gated_adapter_rows_shrink_kernel,
)
from .rows_weight_grad import gated_adapter_rows_weight_grad_kernel
from .tables import config
from .weights import outputs


class Side:
    """One side's rows in order of their expert: the slots of the rows of x, or these where the bank holds one.

    index: of every slot; as given: [B, K] or [B, S, K]. perm, edges: the rows' order, and where an expert's end.
    """

    def __init__(self, x: torch.Tensor, given: torch.Tensor | None, experts: int, slots: int, like: Side | None):
        rows = x.shape[0] * x.shape[1]
        self.given = None if given is None else given.contiguous()
        self.experts, self.rows = experts, rows if experts == 1 else rows * slots
        self.index = self.perm = self.edges = None
        if like is not None and like.perm is not None and experts > 1 and same_ids(like.given, self.given):
            self.index, self.perm, self.edges = like.index, like.perm, like.edges
        elif experts > 1 and given is None:
            self.perm = torch.arange(self.rows, device=x.device).view(rows, slots).t().reshape(-1)
            self.edges = torch.arange(experts + 1, device=x.device) * rows
        elif experts > 1 and given is not None:
            whole = given.unsqueeze(1) if given.dim() == 2 else given
            # reshape gives a view where it can, of a strided index or of one sample's that is expanded.
            self.index = whole.expand(*x.shape[:2], slots).reshape(-1).contiguous()
            # A wrong id goes with the nearest right one: the kernels tell them apart.
            self.perm, self.edges = sort_rows(self.index.long().clamp(0, experts - 1), experts)

    def tiles(self, rows: int) -> Groups:
        if self.perm is None or self.edges is None:
            return Groups(None, None, None, -(-self.rows // rows))
        return group_tiles(self.perm, self.edges, self.rows, rows)


class Call:
    """What the launches of one call share."""

    def __init__(self, x, r, down_index, up_index, gates, md, mu, mix, activation):
        self.slots, self.div = gates.shape[-1], x.shape[1] if gates.dim() == 2 else 1
        self.gates, self.like, self.r = gates.contiguous(), x, r
        self.down = Side(x, down_index, md, self.slots, None)
        self.up = Side(x, up_index, mu, self.slots, self.down)
        self.one_up, self.weights = mu == 1, mix == "weights"
        self.common = dict(
            R=r, RP=max(16, power_of_2(r)), K=self.slots, MD=md, MU=mu, WEIGHTS=self.weights, ACTIVATION=activation,
            DOT=dot_dtype(x.dtype), PRECISION=precision(x.dtype),
        )  # fmt: skip

    def ids(self, side: Side) -> tuple[torch.Tensor | None, ...]:
        return side.index, self.down.given, self.up.given

    def launch(self, kernel, side: Side, *tensors, **constants) -> None:
        """The kernel on tiles of the side's rows; tensors: all that stands before perm."""
        size = self.like.element_size()
        tile = config(kernel.__name__, capability(self.like.device), size, self.common["RP"])
        meta = self.common | tile_options(tile, False, size, self.common["RP"], False) | constants
        names = {*kernel.arg_names, "num_warps", "num_stages", "maxnreg"}
        groups = side.tiles(tile.rows)
        launch(
            kernel, (groups.tiles,), self.like.device, *tensors, *groups[:3], side.rows, self.div,
            **{name: value for name, value in meta.items() if name in names},
        )  # fmt: skip

    def shrink(self, z, bank, bias, weighed, out, beside, side: Side, features: int) -> None:
        self.launch(
            gated_adapter_rows_shrink_kernel, side, z, bank, bias, weighed, *self.ids(side), out, beside,
            C=features, M=side.experts, UP=side is self.up,
        )  # fmt: skip


def forward(call: Call, x, down_weight, down_bias, up_weight, up_bias, residual, out, pre) -> None:
    """Fills out and pre."""
    width = out.shape[2]
    call.shrink(x, down_weight, down_bias, None, pre, None, call.down, x.shape[2])
    y = out if call.one_up else memory(x, call.up.rows, width)
    call.launch(
        gated_adapter_rows_forward_kernel, call.up, pre, up_weight, up_bias, *call.ids(call.up), call.gates,
        residual if call.one_up else None, y, O=width,
    )  # fmt: skip
    if not call.one_up:
        sum_slots(y, residual, out, call.slots, width, (0,))


def backward(
    call: Call, grad_out, x, pre, down_weight, up_weight, up_bias, need_down: bool, need_up: bool, add_input: bool,
    dx, dgates,
):  # fmt: skip
    """(dWd, dbd, dWu, dbu), empty where not needed; fills dx and dgates, those that are not None."""
    hidden, width, r = x.shape[2], grad_out.shape[2], call.r
    many_down, by_sample = call.down.experts > 1, dgates is not None and call.gates.dim() == 2
    weighs_bias = dgates is not None and up_bias is not None and not (call.weights and call.one_up)
    u = memory(x, call.up.rows, r, dtype=torch.float32)
    beside = memory(x, call.up.rows, dtype=torch.float32) if weighs_bias else None
    call.shrink(grad_out, up_weight, None, up_bias if weighs_bias else None, u, beside, call.up, width)
    dpre = memory(x, call.down.rows, r) if need_down else None
    h, weights = (memory(x, call.up.rows, r), memory(x, call.up.rows)) if need_up else (None, None)
    if h is not None and weights is not None and not call.slots:
        # No slot's row writes them.
        h.zero_()
        weights.fill_(1.0 if call.weights else 0.0)
    rows = x.shape[0] * x.shape[1]
    row_grads = memory(x, rows, call.slots, dtype=torch.float32) if by_sample else None
    added = grad_out if add_input else None
    y = memory(x, call.down.rows, hidden) if dx is not None and many_down else dx
    call.launch(
        gated_adapter_rows_grad_kernel, call.down, pre, u, beside, down_weight, *call.ids(call.down), call.gates,
        None if many_down else added, dpre, h, weights, row_grads if by_sample else dgates, y, H=hidden,
    )  # fmt: skip
    if dx is not None and many_down:
        sum_slots(y, added, dx, call.slots, hidden, (0,))
    return _weight_grads(call, x, dpre, grad_out, h, weights, row_grads, dgates, down_weight.shape, up_weight.shape)


def _weight_grads(call: Call, x, dpre, grad_out, h, weights, row_grads, dgates, down_shape, up_shape):
    (md, r, hidden), (mu, width, _) = down_shape, up_shape
    need = (dpre is not None, h is not None)
    down, up = outputs(x, down_shape, need[0]), outputs(x, up_shape, need[1])
    if not any(need) and row_grads is None:
        return *down, *up
    kernel = gated_adapter_rows_weight_grad_kernel
    chosen = config(kernel.__name__, capability(x.device), x.element_size(), call.common["RP"])
    # A side of no features still has its bias.
    blocks = [max(1, -(-n // chosen.cols)) for n in (hidden, width)]
    features = sum(b for b, wanted in zip(blocks, need) if wanted)
    # Of one expert's planes, which hold its share of the rows.
    down_splits, up_splits = (
        max(1, count_splits(side.rows, max(1, features), chosen.rows, r, x.element_size()) // side.experts)
        for side in (call.down, call.up)
    )
    planes = [memory(x, down_splits, *t.shape, dtype=torch.float32) if down_splits > 1 else t for t in down]
    planes += [memory(x, up_splits, *t.shape, dtype=torch.float32) if up_splits > 1 else t for t in up]
    samples = 0 if row_grads is None else x.shape[0]
    programs = need[0] * md * (-(-hidden // chosen.cols) + 1) * down_splits + need[1] * mu * blocks[1] * up_splits
    absent = [None, None]
    names: dict[str, Any] = {name: value for name, value in call.common.items() if name in kernel.arg_names}
    launch(
        kernel, (programs + samples,), x.device,
        x, dpre, grad_out, h, weights, call.down.perm, call.down.edges, call.up.perm, call.up.edges, row_grads,
        *(planes[:2] if need[0] else absent), *(planes[2:] if need[1] else absent),
        None if row_grads is None else dgates, x.shape[0] * x.shape[1], call.div, down_splits, up_splits,
        **names, H=hidden, O=width, KP=power_of_2(call.slots), ROWS=chosen.rows, COLS=chosen.cols, CHUNK=CHUNK,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    sum_planes(x, planes, (*down, *up), down_splits, up_splits)
    return *down, *up
