"""What the ahead-of-time gate compiles: every kernel, dtype and shipped configuration, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from ...._triton_utils import DTYPES, precision
from ..._one_read import PROGRAMS
from ..._routed_plan import MAX_WIDTH, fits, power_of_2
from ..._triton_aot import POINTERS, AotCase, make_case
from . import one_read
from .forward import lora_forward_kernel
from .grad_out_pass import lora_grad_out_pass_kernel
from .input_grad import lora_dx_kernel
from .plan import RESIDENT, RESIDENT_WIDTH, TALL, gaps, may_be_tall, padded_rank, row_blocks
from .plane_sum import lora_sum_kernel
from .tables import MAX_REGISTERS, config
from .weight_grad import lora_grads_kernel
from .weights import SUM_AHEAD, SUM_BLOCK, WIDE_SUM_BLOCK, WINDOW

# Features and columns of a group in the compiled cases: a multiple of every block, as in the models LoRA serves.
_HIDDEN = 1024
# name -> (experts of A, groups, r, per token, dropout); together they reach every shape class of the tables.
_SHAPES = {
    "sample_m4_r4_qv": (4, 2, 4, False, True),
    "sample_m4_r16_qv": (4, 2, 16, False, False),
    "sample_m4_r64": (4, 1, 64, False, True),
    "sample_m4_r256": (4, 1, 256, False, True),
    "token_m4_r16": (4, 1, 16, True, True),
    "token_m8_r16": (8, 1, 16, True, True),
    "token_m16_r16": (16, 1, 16, True, True),
    "grouped_m64_r16": (64, 1, 16, True, True),
}
# Fewer tokens a sample than a program sums; A alone is routed.
_SHORT = {
    "short_m4_r16": (4, 1, 16, False, True),
    "short_m64_r64": (64, 1, 64, False, False),
}


def aot_cases(capability: int = 90) -> Iterator[AotCase]:
    """Every case with the block sizes shipped for a capability (10 * major + minor)."""
    for case in _cases(capability):
        # 12.x has 100 KB of shared memory, where two programs of the widest steps do not fit.
        yield case._replace(resident=1) if capability >= 120 else case


def _cases(capability: int) -> Iterator[AotCase]:
    for dtype in POINTERS:
        for name, shape in _SHAPES.items():
            yield from _tile_cases(name, dtype, capability, *shape)
            yield _grads_case(name, dtype, capability, *shape)
        for name, shape in _SHORT.items():
            yield _grads_case(name, dtype, capability, *shape, by_sample="samples")
        yield from _inplace_cases("sample_m4_r4_qv", dtype, capability)
        yield from _sum_cases(dtype)
        if dtype.itemsize == 2 and capability in PROGRAMS:
            yield _pass_case(dtype)


def _common(dtype, experts, groups, r, seed):
    offsets = tuple(2 * g * _HIDDEN for g in range(groups))
    scalars = ("span", "a_divisor", "b_divisor", "threshold")
    return dict.fromkeys(scalars, "i32") | dict(
        a_index_ptr="*i64", b_index_ptr=None, perm_ptr=None, seed_ptr="*i64" if seed else None,
        inv_keep="fp32", scaling="fp32", K=_HIDDEN, RANK=r, NG=_HIDDEN, WIDTH=(2 * groups - 1) * _HIDDEN,
        OFFSETS=offsets, A_EXPERTS=experts, B_EXPERTS=1, DOT=DTYPES[dtype], PRECISION=precision(dtype),
    )  # fmt: skip


def _tile_cases(name, dtype, capability, experts, groups, r, per_token, dropout):
    packed = groups * r
    masked = per_token and fits(experts, packed)
    rp = power_of_2(packed) if masked else padded_rank(packed)
    padded = max(power_of_2(experts) if masked else 1, 16 // rp)
    order = "*i64" if per_token and not masked else None
    arguments = _common(dtype, experts, groups, r, dropout)
    arguments |= dict(RP=rp, CHUNKS=-(-packed // rp), perm_ptr=order, start_ptr=order, stop_ptr=order)
    # Each kernel is compiled with the per-token side where it meets it first: A forward, B in the input gradient.
    for kernel, first, second in ((lora_forward_kernel, "A", "B"), (lora_dx_kernel, "B", "A")):
        width = min(power_of_2(max(16, packed)) * padded, MAX_WIDTH)
        chosen = config(kernel.__name__, capability, dtype.itemsize, width)
        own = {}
        for side, count, mask in ((first, experts, masked), (second, experts if masked else 1, masked)):
            columns = padded if mask else max(1, 16 // rp)
            own |= {f"{side}_EXPERTS": count, f"{side}_PADDED": columns, f"{side}_MASKED": mask}
            own[f"{side.lower()}_index_ptr"] = "*i64" if count > 1 else None
        own["GAPS"] = gaps(arguments["OFFSETS"], _HIDDEN, arguments["WIDTH"])
        tensors = ("x_ptr", "a_ptr", "b_ptr", "base_ptr", "out_ptr", "t_ptr", "grad_ptr", "dx_ptr", "dt_ptr")
        own |= dict.fromkeys(tensors, POINTERS[dtype]) | dict(keys_ptr="*i32" if dropout else None)
        tall = may_be_tall(kernel.__name__, capability, dtype.itemsize, width, per_token)
        for rows in [*[TALL][:tall], *row_blocks(chosen.rows)]:
            own |= dict(BLOCK_M=rows, BLOCK_C=chosen.cols, STAGES=chosen.num_stages)
            yield _case(kernel, f"{name}_rows{rows}", dtype, chosen, arguments | own, width)


def _inplace_cases(name, dtype, capability):
    for case in _tile_cases(f"{name}_inplace", dtype, capability, *_SHAPES[name]):
        if case.fn is lora_forward_kernel:
            yield case._replace(constexprs=case.constexprs | dict(GAPS=()))


def _grads_case(name, dtype, capability, experts, groups, r, per_token, dropout, by_sample="parts"):
    arguments = _common(dtype, experts, groups, r, dropout)
    # (experts, narrow columns, index); B is shared.
    sides = {"A": (experts, groups * r, "*i64"), "B": (1, r, None)}
    width = 0
    for side, (count, columns, index) in sides.items():
        mode, rp, padded = "all", padded_rank(columns), 1
        if count > 1:
            mode = by_sample if not per_token else "tokens" if fits(count, columns) else "sorted"
        if mode == "tokens":
            rp = power_of_2(columns)
            padded = max(power_of_2(count), 16 // rp)
        width = max(width, rp * padded)
        arguments |= {f"{side}_MODE": mode, f"{side}_EXPERTS": count, f"{side}_PADDED": padded, f"{side}_RP": rp}
        low, order = side.lower(), "*i64" if mode == "sorted" else None
        arguments |= {f"{low}_perm_ptr": order, f"{low}_edges_ptr": order, f"{low}_plane_ptr": "*fp32"}
        arguments[f"{low}_index_ptr"] = index if mode in ("tokens", "samples") else None
        arguments[f"d{low}_ptr"] = POINTERS[dtype] if mode == "samples" else None
        arguments |= dict.fromkeys((f"{low}_share", f"{low}_splits"), "i32")
    chosen = config(lora_grads_kernel.__name__, capability, dtype.itemsize, width)
    arguments |= dict.fromkeys(("x_ptr", "grad_ptr", "dt_ptr", "t_ptr"), POINTERS[dtype])
    arguments |= dict.fromkeys(("num_rows", "batch", "a_programs"), "i32")
    arguments |= dict(
        BLOCK_M=chosen.rows, BLOCK_C=chosen.cols, STAGES=chosen.num_stages, SLOTS=1, EACH=1, WINDOW=WINDOW
    )
    arguments["keys_ptr"] = "*i32" if dropout else None
    return _case(lora_grads_kernel, name, dtype, chosen, arguments, width)


def _pass_case(dtype):
    arguments = dict(b_index_ptr=None, K=_HIDDEN, NG=_HIDDEN, R=16, A_EXPERTS=4, inv_keep="fp32", scaling="fp32")
    arguments |= dict(a_index_ptr="*i64", seed_ptr="*i64", keys_ptr="*i32", plane_ptr="*fp32")
    arguments |= dict.fromkeys(("grad_ptr", "t_ptr", "a_ptr", "b_ptr", "dx_ptr", "dt_ptr"), POINTERS[dtype])
    arguments |= dict.fromkeys(("batch", "span", "a_divisor", "b_divisor", "threshold", "share"), "i32")
    arguments |= one_read.constants(_HIDDEN, _HIDDEN, dtype)
    options = dict(warps=arguments["num_warps"], stages=arguments["num_stages"])
    return make_case(lora_grad_out_pass_kernel, "sample_m4_r16", dtype, arguments, **options)


def _sum_cases(dtype):
    arguments = dict.fromkeys(("a_plane_ptr", "b_plane_ptr"), "*fp32") | dict(
        b_index_ptr=None, BLOCK=SUM_BLOCK, AHEAD=SUM_AHEAD
    )
    arguments |= dict.fromkeys(("da_ptr", "db_ptr"), POINTERS[dtype])
    arguments |= dict.fromkeys(("batch", "a_share", "a_splits", "a_programs", "b_share", "b_splits"), "i32")
    arguments |= dict(A_SIZE=16 * _HIDDEN, A_EXPERTS=4, B_SIZE=16 * _HIDDEN, B_MODE="all", B_EXPERTS=1, WINDOW=WINDOW)
    for mode, index in (("parts", "*i64"), ("samples", "*i64"), ("tokens", None)):
        own = dict(A_MODE=mode, a_index_ptr=index)
        yield _case(lora_sum_kernel, mode, dtype, None, arguments | own)
    own = dict(A_MODE="samples", a_index_ptr="*i64", A_EXPERTS=64, BLOCK=WIDE_SUM_BLOCK)
    yield _case(lora_sum_kernel, "samples_wide", dtype, None, arguments | own)


def _case(fn, name, dtype, chosen, arguments, width=16) -> AotCase:
    warps, stages = (chosen.num_warps, chosen.num_stages) if chosen is not None else (4, 2)
    case = make_case(fn, name, dtype, arguments, warps=warps, stages=stages, maxnreg=MAX_REGISTERS)
    return case._replace(resident=RESIDENT if dtype.itemsize == 2 and width <= RESIDENT_WIDTH else 1)
