"""What the ahead-of-time gate compiles: every kernel, dtype and shipped configuration, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from ...._triton_utils import DTYPES, precision
from ..._routed_plan import fits, power_of_2
from ..._triton_aot import POINTERS, AotCase, make_case
from .forward import lora_forward_kernel
from .input_grad import lora_dx_kernel
from .plan import RESIDENT, SUM_BLOCK, gaps, padded_rank, row_blocks
from .tables import config, register_limit
from .weight_grad import lora_grads_kernel, lora_sum_kernel

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


def aot_cases(capability: int = 90) -> Iterator[AotCase]:
    """Every case with the block sizes shipped for a capability (10 * major + minor)."""
    for case in _cases(capability):
        alone = case.dtype == "float32" or "token_m16_r16" in case.name
        yield case._replace(resident=1 if alone else RESIDENT)


def _cases(capability):
    for dtype in POINTERS:
        for name, shape in _SHAPES.items():
            yield from _tile_cases(name, dtype, capability, *shape)
            yield _grads_case(name, dtype, capability, *shape)
        yield from _inplace_cases("sample_m4_r4_qv", dtype, capability)
        yield _sum_case(dtype)


def _common(dtype, experts, groups, r, seed):
    offsets = tuple(2 * g * _HIDDEN for g in range(groups))
    scalars = ("span", "num_rows", "split_tiles", "a_divisor", "b_divisor", "threshold")
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
        width = rp * padded
        chosen = config(kernel.__name__, capability, dtype.itemsize, width)
        own = {}
        for side, count, mask in ((first, experts, masked), (second, experts if masked else 1, masked)):
            columns = padded if mask else max(1, 16 // rp)
            own |= {f"{side}_EXPERTS": count, f"{side}_PADDED": columns, f"{side}_MASKED": mask}
            own[f"{side.lower()}_index_ptr"] = "*i64" if count > 1 else None
        own["GAPS"] = gaps(arguments["OFFSETS"], _HIDDEN, arguments["WIDTH"])
        tensors = ("x_ptr", "a_ptr", "b_ptr", "base_ptr", "out_ptr", "t_ptr", "grad_ptr", "dx_ptr", "dt_ptr")
        own |= dict.fromkeys(tensors, POINTERS[dtype])
        for rows in row_blocks(chosen.rows):
            own |= dict(BLOCK_M=rows, BLOCK_C=chosen.cols, STAGES=chosen.num_stages)
            limit = register_limit(dtype.itemsize, width)
            yield _case(kernel, f"{name}_rows{rows}", dtype, chosen, arguments | own, limit)


def _inplace_cases(name, dtype, capability):
    for case in _tile_cases(f"{name}_inplace", dtype, capability, *_SHAPES[name]):
        if case.fn is lora_forward_kernel:
            yield case._replace(constexprs=case.constexprs | dict(GAPS=()))


def _grads_case(name, dtype, capability, experts, groups, r, per_token, dropout):
    block = padded_rank(groups * r)
    chosen = config(lora_grads_kernel.__name__, capability, dtype.itemsize, block)
    arguments = _common(dtype, experts, groups, r, dropout)
    arguments |= dict.fromkeys(("x_ptr", "grad_ptr", "dt_ptr", "t_ptr"), POINTERS[dtype])
    arguments |= dict(a_plane_ptr="*fp32", b_plane_ptr="*fp32", BLOCK_M=chosen.rows, BLOCK_C=chosen.cols)
    arguments |= dict(BLOCK_RA=block, BLOCK_RB=padded_rank(r), perm_ptr="*i64" if "grouped" in name else None)
    return _case(lora_grads_kernel, name, dtype, chosen, arguments, register_limit(dtype.itemsize, block))


def _sum_case(dtype):
    arguments = dict(a_plane_ptr="*fp32", b_plane_ptr="*fp32", da_ptr=POINTERS[dtype], db_ptr=POINTERS[dtype])
    arguments |= dict.fromkeys(("a_size", "b_size", "splits"), "i32") | dict(BLOCK=SUM_BLOCK)
    return _case(lora_sum_kernel, "any", dtype, None, arguments)


def _case(fn, name, dtype, chosen, arguments, maxnreg=255) -> AotCase:
    warps, stages = (chosen.num_warps, chosen.num_stages) if chosen is not None else (4, 2)
    return make_case(fn, name, dtype, arguments, warps=warps, stages=stages, maxnreg=maxnreg)
