"""What the ahead-of-time gate compiles: every kernel, dtype and shipped configuration, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from ...._triton_utils import DTYPES, precision
from ..._adapter_planes import SUM_CHUNK, SUM_COLS, adapter_plane_sum_kernel
from ..._one_read import PROGRAMS
from ..._routed_plan import power_of_2
from ..._triton_aot import POINTERS, AotCase, make_case
from . import one_read
from .forward import adapter_forward_kernel
from .grad_out_pass import adapter_grad_out_pass_kernel
from .input_grad import adapter_input_grad_kernel
from .tables import RESIDENT, RESIDENT_RANK, config, row_tile, sums_by_dot, tile_options
from .weight_grad import adapter_weight_grad_kernel

# hidden size of the compiled cases: a multiple of every block, as in the models AdaMix is used with.
_HIDDEN = 1024
# routing -> (experts, r) of the compiled cases; together they reach every shape class of the tables. The up side is
# shared, but for "both".
_SHAPES = {
    "sample": ((4, 16), (4, 32), (4, 64), (4, 128), (4, 256)),
    "token": ((4, 16), (64, 4)),
    "both": ((4, 16), (64, 4)),
    "grouped": ((64, 16),),
}


def aot_cases(capability: int = 90) -> Iterator[AotCase]:
    """Every case with the block sizes shipped for a capability (10 * major + minor)."""
    for dtype, pointer in POINTERS.items():
        for routing, shapes in _SHAPES.items():
            for experts, r in shapes:
                name = f"{routing}_m{experts}_r{r}"
                yield from _tile_cases(name, dtype, pointer, routing, experts, r, capability)
                yield _weight_case(name, dtype, pointer, routing, experts, r, capability)
        yield _sum_case(dtype, pointer)
        if dtype.itemsize == 2 and capability in PROGRAMS:
            yield _pass_case(dtype, pointer)


def _tile_cases(name, dtype, pointer, routing, experts, r, capability):
    masked, both = routing in ("token", "both"), routing == "both"
    rp = power_of_2(r) if masked else max(16, power_of_2(r))
    padded = max(power_of_2(experts) if masked else 1, 16 // rp)
    table = "*i64" if routing == "grouped" else None
    common = dict(
        down_index="*i64", up_index="*i64" if both else None, perm=table, tile_start=table, tile_stop=table,
        span="i32", down_div="i32", up_div="i32", H=_HIDDEN, O=_HIDDEN, R=r, RP=rp,
        MD=experts, MDP=padded, MASK_D=masked,
        MU=experts if both else 1, MUP=padded if both else max(1, 16 // rp), MASK_U=both,
        ACTIVATION="gelu", DOT=DTYPES[dtype], PRECISION=precision(dtype),
    )  # fmt: skip
    tensors = {
        adapter_forward_kernel: ("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual", "out", "pre"),
        adapter_input_grad_kernel: ("grad_out", "pre", "up_weight", "down_weight", "dpre", "h", "dx"),
    }
    for fn, pointers in tensors.items():
        second = both if fn is adapter_forward_kernel else masked
        for stays in (False,) if second else (False, True):
            width, size = rp * padded, dtype.itemsize
            tile, keep = row_tile(fn.__name__, capability, size, width, _HIDDEN, stays)
            if keep != stays:
                continue
            arguments = common | dict.fromkeys(pointers, pointer) | dict(ADD_GRAD=True)
            arguments |= tile_options(tile, keep, size, width, masked)
            options = dict(warps=arguments["num_warps"], stages=arguments["num_stages"], maxnreg=arguments["maxnreg"])
            case = make_case(fn, f"{name}_kept" if keep else name, dtype, arguments, **options)
            counted_on = RESIDENT if size == 2 and routing == "sample" and r <= RESIDENT_RANK else 1
            yield case._replace(resident=min(2, counted_on) if keep else counted_on)


def _weight_case(name, dtype, pointer, routing, experts, r, capability):
    rp = max(16, power_of_2(r))
    grouped = "*i64" if routing == "grouped" else None
    both = routing == "both"
    arguments = dict(
        down_index=None if grouped else "*i64", down_perm=grouped, down_edges=grouped,
        up_index="*i64" if both else None, up_perm=None, up_edges=None, H=_HIDDEN, O=_HIDDEN, R=r, RP=rp,
        MD=experts, MASK_D=routing in ("token", "both"), MU=experts if both else 1, MASK_U=both,
        ACTIVATION="", ONES=sums_by_dot(capability, dtype.itemsize, rp), DOT=DTYPES[dtype],
        PRECISION=precision(dtype),
    )  # fmt: skip
    arguments |= dict.fromkeys(("x", "dpre", "grad_out", "h"), pointer)
    arguments |= dict.fromkeys(("down_plane", "down_bias_plane", "up_plane", "up_bias_plane"), "*fp32")
    sizes = ("down_batch", "down_span", "down_div", "up_batch", "up_span", "up_div", "down_splits", "up_splits")
    arguments |= dict.fromkeys(sizes, "i32")
    chosen = config("adapter_weight_grad_kernel", capability, dtype.itemsize, rp)
    arguments |= dict(ROWS=chosen.rows, COLS=chosen.cols)
    options = dict(warps=chosen.num_warps, stages=chosen.num_stages)
    case = make_case(adapter_weight_grad_kernel, name, dtype, arguments, **options)
    return case._replace(resident=RESIDENT if routing == "sample" and r <= RESIDENT_RANK and dtype.itemsize == 2 else 1)


def _pass_case(dtype, pointer):
    arguments = dict(
        up_index=None, down_index="*i64", up_plane="*fp32", up_bias_plane="*fp32", H=_HIDDEN, R=16, MD=4,
        ACTIVATION="gelu", ADD_GRAD=True, **one_read.constants(_HIDDEN, dtype),
    )  # fmt: skip
    arguments |= dict.fromkeys(("grad_out", "pre", "up_weight", "down_weight", "dpre", "dx"), pointer)
    arguments |= dict.fromkeys(("batch", "span", "down_div", "up_div", "share"), "i32")
    options = dict(warps=arguments["num_warps"], stages=arguments["num_stages"])
    return make_case(adapter_grad_out_pass_kernel, "sample_m4_r16", dtype, arguments, **options)


def _sum_case(dtype, pointer):
    arguments = dict(
        down_splits="i32", up_splits="i32", DOWN=4 * 16 * _HIDDEN, DOWN_BIAS=4 * 16, UP=16 * _HIDDEN, UP_BIAS=_HIDDEN,
        CHUNK=SUM_CHUNK, COLS=SUM_COLS,
    )  # fmt: skip
    for part in ("down", "down_bias", "up", "up_bias"):
        arguments |= {f"{part}_plane": "*fp32", f"{part}_grad": pointer}
    return make_case(adapter_plane_sum_kernel, "m4_r16", dtype, arguments)
