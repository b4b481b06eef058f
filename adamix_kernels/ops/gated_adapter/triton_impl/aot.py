"""What the ahead-of-time gate compiles: every kernel, dtype and shipped configuration, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...._triton_utils import DTYPES, precision
from ..._gated_sum import CHUNK
from ..._routed_plan import power_of_2
from ..._row_tiles import row_tile, tile_options
from ..._triton_aot import POINTERS, AotCase, make_case
from .forward import gated_adapter_forward_kernel
from .input_grad import gated_adapter_input_grad_kernel
from .plan import Plan, make_plan
from .rows_aot import rows_cases
from .tables import config, may_stay, rows_table
from .weight_grad import gated_adapter_weight_grad_kernel

# hidden size of the compiled cases: a multiple of every block, as in the models AdaMix is used with.
_HIDDEN = 1024
# form -> (experts, r, slots) of the compiled cases; together they reach every shape class of the tables.
_SHAPES = {
    "dense": ((4, 4, 4), (4, 16, 4), (8, 16, 8), (8, 32, 8)),
    "chosen": ((8, 8, 2), (64, 4, 4)),
    "shared_up": ((4, 16, 4),),
}


def aot_cases(capability: int = 90) -> Iterator[AotCase]:
    """Every case with the block sizes shipped for a capability (10 * major + minor)."""
    for dtype, pointer in POINTERS.items():
        for form, shapes in _SHAPES.items():
            for experts, r, slots in shapes:
                plan = _plan(form, experts, r, slots)
                name = f"{form}_m{experts}_r{r}_k{slots}"
                yield from _tile_cases(name, dtype, pointer, plan, r, capability)
                yield _weight_case(name, dtype, pointer, plan, r, capability)
    # What the gates weigh, and whether a slot has one id, is decided between the products: a case more a dtype.
    for dtype, pointer in POINTERS.items():
        plan = _plan("dense", 4, 16, 4)._replace(weights=True)
        yield from _tile_cases("weights_m4_r16_k4", dtype, pointer, plan, 16, capability)
        apart = _plan("chosen", 8, 8, 2)._replace(same=False)
        yield from _tile_cases("apart_m8_r8_k2", dtype, pointer, apart, 8, capability)
        if dtype.itemsize == 2 and capability < 86:
            # The one class with a table of its own, see tables.py.
            chosen = _tile_cases("chosen_m8_r16_k2", dtype, pointer, _plan("chosen", 8, 16, 2), 16, capability)
            yield from (case for case in chosen if case.fn is gated_adapter_forward_kernel)
        yield from rows_cases(dtype, pointer, capability)


def _plan(form: str, experts: int, r: int, slots: int) -> Plan:
    down, up = experts, (1 if form == "shared_up" else experts)
    gates = torch.empty(1, 1, slots, device="meta")
    index = None if slots == experts else torch.empty(1, 1, slots, dtype=torch.int64, device="meta")
    x = torch.empty(1, 1, _HIDDEN, device="meta")
    plan = make_plan(x, r, index, None if up == 1 else index, gates, down, up, "outputs")
    assert plan is not None
    return plan


def _tile_cases(name: str, dtype: torch.dtype, pointer: str, plan: Plan, r: int, capability: int) -> Iterator[AotCase]:
    activation = "gelu_16" if dtype.itemsize == 2 else "gelu"
    common = dict(
        down_index=_index(plan.down.index), up_index=_index(plan.up.index), gates="*fp32", span="i32", div="i32",
        H=_HIDDEN, O=_HIDDEN, SAME=plan.same, ACTIVATION=activation, DOT=DTYPES[dtype], PRECISION=precision(dtype),
        **plan.constants(r),
    )  # fmt: skip
    tensors = {
        gated_adapter_forward_kernel: (
            "x", "down_weight", "down_bias", "up_weight", "up_bias", "residual", "out", "pre",
        ),
        gated_adapter_input_grad_kernel: (
            "grad_out", "pre", "up_weight", "down_weight", "up_bias", "dpre", "h", "weights", "dx",
        ),
    }  # fmt: skip
    for fn, pointers in tensors.items():
        second = plan.up.kind if fn is gated_adapter_forward_kernel else plan.down.kind
        for stays in (False,) if second == "chosen" or not may_stay(fn.__name__, capability, plan) else (False, True):
            size, table = dtype.itemsize, rows_table(fn.__name__, plan)
            tile, keep = row_tile(fn.__name__, table, capability, size, plan.width, _HIDDEN, stays)
            if keep != stays:
                continue
            arguments = common | dict.fromkeys(pointers, pointer) | dict(ADD_GRAD=True, dgates="*fp32")
            arguments |= tile_options(tile, keep, size, plan.width, False)
            options = dict(warps=arguments["num_warps"], stages=arguments["num_stages"], maxnreg=arguments["maxnreg"])
            yield make_case(fn, f"{name}_kept" if keep else name, dtype, arguments, **options)


def _weight_case(name: str, dtype: torch.dtype, pointer: str, plan: Plan, r: int, capability: int) -> AotCase:
    widths = [max(16, power_of_2(side.experts * r)) for side in (plan.down, plan.up)]
    chosen = config("gated_adapter_weight_grad_kernel", capability, dtype.itemsize, max(widths))
    arguments = dict(
        down_index=_index(plan.down.index), up_index=_index(plan.up.index), row_grads="*fp32", dgates="*fp32",
        H=_HIDDEN, O=_HIDDEN, R=r, K=plan.slots, KP=power_of_2(plan.slots),
        MD=plan.down.experts, DOWN=plan.down.kind, DOWN_WIDTH=widths[0],
        MU=plan.up.experts, UP=plan.up.kind, UP_WIDTH=widths[1], GP=plan.biases,
        DOT=DTYPES[dtype], PRECISION=precision(dtype), ROWS=chosen.rows, COLS=chosen.cols, CHUNK=CHUNK,
    )  # fmt: skip
    arguments |= dict.fromkeys(("x", "dpre", "grad_out", "h", "weights"), pointer)
    arguments |= dict.fromkeys(("down_plane", "down_bias_plane", "up_plane", "up_bias_plane"), "*fp32")
    arguments |= dict.fromkeys(("num_rows", "div", "down_splits", "up_splits"), "i32")
    options = dict(warps=chosen.num_warps, stages=chosen.num_stages)
    return make_case(gated_adapter_weight_grad_kernel, name, dtype, arguments, **options)


def _index(index: torch.Tensor | None) -> str | None:
    return None if index is None else "*i64"
