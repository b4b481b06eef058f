"""What the ahead-of-time gate compiles: every kernel, dtype and shipped configuration, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...._triton_utils import DTYPES, precision
from ..._gated_sum import CHUNK, SUM_COLUMNS, SUM_ROWS, gated_rows_sum_kernel, gated_sample_sum_kernel
from ..._routed_plan import power_of_2
from ..._triton_aot import POINTERS, AotCase, make_case
from ...routed_lora.triton_impl.plan import RESIDENT, RESIDENT_WIDTH, padded_rank, row_blocks
from ...routed_lora.triton_impl.tables import MAX_REGISTERS, config
from ...routed_lora.triton_impl.weight_grad import lora_grads_kernel
from ...routed_lora.triton_impl.weights import WINDOW
from .forward import gated_lora_forward_kernel
from .input_grad import gated_lora_dx_kernel
from .rows import gated_rows_dx_kernel, gated_rows_forward_kernel

_HIDDEN = 1024
# name -> (experts of A, experts of B, r, slots, chosen, dropout, weights)
_TILES = {
    "dense_m8_r8": (8, 8, 8, 8, False, False, False),
    "top2_m8_r8": (8, 8, 8, 2, True, False, False),
    "dense_m8_r32": (8, 8, 32, 8, False, True, False),
    "top2_m16_r16": (16, 16, 16, 2, True, True, False),
    "hydra_m3_r8": (1, 3, 8, 3, False, True, False),
    "weights_m8_r8": (8, 8, 8, 8, False, False, True),
}
# name -> (experts, r, slots, dropout)
_ROWS = {"top2_m64_r16": (64, 16, 2, False), "top2_m8_r64": (8, 64, 2, True), "top2_m4_r256": (4, 256, 2, False)}


def aot_cases(capability: int = 90) -> Iterator[AotCase]:
    """Every case with the block sizes shipped for a capability (10 * major + minor)."""
    for case in _cases(capability):
        # 12.x has 100 KB of shared memory, where two programs of the widest steps do not fit.
        yield case._replace(resident=1) if capability >= 120 else case


def _cases(capability: int) -> Iterator[AotCase]:
    for dtype in POINTERS:
        for name, shape in _TILES.items():
            yield from _tile_cases(name, dtype, capability, *shape)
        for name, shape in _ROWS.items():
            yield from _rows_cases(name, dtype, capability, *shape)
        arguments = dict(y_ptr=POINTERS[dtype], base_ptr=POINTERS[dtype], out_ptr=POINTERS[dtype], num_rows="i32")
        arguments |= dict(SLOTS=2, WIDTH=_HIDDEN, NG=_HIDDEN, OFFSETS=(0,), BLOCK_M=SUM_ROWS, BLOCK_C=SUM_COLUMNS)
        yield make_case(gated_rows_sum_kernel, "top2", dtype, arguments)
        arguments = dict(row_grads="*fp32", dgates=POINTERS[dtype], tokens="i32", K=8, KP=8, CHUNK=CHUNK)
        yield make_case(gated_sample_sum_kernel, "m8", dtype, arguments)


def _common(dtype: torch.dtype, r: int, slots: int, dropout: bool, index: str | None) -> dict:
    pointers = ("x", "a", "b", "base", "out", "t", "grad", "dx", "u", "dt", "p")
    return dict.fromkeys((f"{name}_ptr" for name in pointers), POINTERS[dtype]) | dict(
        a_index_ptr=index, b_index_ptr=index, gates_ptr="*fp32", dgates_ptr="*fp32", scales_ptr=None,
        seed_ptr="*i64" if dropout else None, keys_ptr="*i32" if dropout else None, span="i32", divisor="i32",
        threshold="i32", inv_keep="fp32", scaling="fp32", K=_HIDDEN, RANK=r, NG=_HIDDEN, WIDTH=_HIDDEN, OFFSETS=(0,),
        GAPS=(), SLOTS=slots, BY_SAMPLE=False, DOT=DTYPES[dtype], PRECISION=precision(dtype),
    )  # fmt: skip


def _tile_cases(name, dtype, capability, of_a, of_b, r, slots, is_chosen, dropout, weights):
    arguments = _common(dtype, r, slots, dropout, "*i64" if is_chosen else None)
    rp = power_of_2(r)
    padded = {side: max(power_of_2(m), 16 // rp) for side, m in (("A", of_a), ("B", of_b))}
    width = rp * max(padded.values())
    for side, m in (("A", of_a), ("B", of_b)):
        arguments |= {f"{side}_EXPERTS": m, f"{side}_PADDED": padded[side], f"{side}_MASKED": m > 1}
    arguments |= dict(RP=rp, WEIGHTS=weights)
    for fn, like in ((gated_lora_forward_kernel, "lora_forward_kernel"), (gated_lora_dx_kernel, "lora_dx_kernel")):
        chosen = config(like, capability, dtype.itemsize, width)
        for rows in row_blocks(chosen.rows):
            blocks = dict(BLOCK_M=rows, BLOCK_C=chosen.cols, STAGES=chosen.num_stages)
            yield _case(fn, f"{name}_rows{rows}", dtype, chosen, arguments | blocks, width)
    sides = {}
    for side, m in (("A", of_a), ("B", of_b)):
        mode = "gated" if m > 1 else "all"
        own_rp = rp if m > 1 else padded_rank(r)
        own = padded[side] if m > 1 else 1
        sides |= {f"{side}_MODE": mode, f"{side}_EXPERTS": m, f"{side}_PADDED": own, f"{side}_RP": own_rp}
    yield _grads_case(f"gated_{name}", dtype, capability, arguments, sides, width, None, slots, 1)


def _rows_cases(name, dtype, capability, experts, r, slots, dropout):
    order, rp = "*i64", padded_rank(r)
    arguments = _common(dtype, r, slots, dropout, "*i64")
    arguments |= dict(perm_ptr=order, start_ptr=order, stop_ptr=order, z_ptr=None, RP=rp, CHUNKS=-(-r // rp))
    arguments |= dict(A_EXPERTS=experts, B_EXPERTS=experts)
    for fn, like in ((gated_rows_forward_kernel, "lora_forward_kernel"), (gated_rows_dx_kernel, "lora_dx_kernel")):
        chosen = config(like, capability, dtype.itemsize, power_of_2(r))
        blocks = dict(BLOCK_M=chosen.rows, BLOCK_C=chosen.cols, STAGES=chosen.num_stages)
        yield _case(fn, name, dtype, chosen, arguments | dict(u_ptr=None) | blocks, power_of_2(r))
        # The second launch where weights are mixed.
        blocks |= dict(x_ptr=None, grad_ptr=None, z_ptr=POINTERS[dtype] if r > rp else None)
        yield _case(fn, f"{name}_mixed", dtype, chosen, arguments | blocks, power_of_2(r))
    sides = {}
    for side in "AB":
        sides |= {f"{side}_MODE": "sorted", f"{side}_EXPERTS": experts, f"{side}_PADDED": 1, f"{side}_RP": rp}
    yield _grads_case(f"gated_{name}", dtype, capability, arguments, sides, rp, order, 1, slots)


def _grads_case(name, dtype, capability, arguments, sides, width, order, slots, each):
    chosen = config(lora_grads_kernel.__name__, capability, dtype.itemsize, width)
    numbers = [
        "num_rows",
        "batch",
        "a_programs",
        *(f"{side}_{n}" for side in "ab" for n in ("divisor", "share", "splits")),
    ]
    arguments = arguments | sides | dict.fromkeys(numbers, "i32") | dict(SLOTS=slots, EACH=each, WINDOW=WINDOW)
    for side in "ab":
        arguments |= {
            f"d{side}_ptr": None,
            f"{side}_perm_ptr": order,
            f"{side}_edges_ptr": order,
            f"{side}_plane_ptr": "*fp32",
        }
    if order is not None:
        arguments |= dict(a_index_ptr=None, b_index_ptr=None)
    arguments |= dict(BLOCK_M=chosen.rows, BLOCK_C=chosen.cols, STAGES=chosen.num_stages)
    return _case(lora_grads_kernel, name, dtype, chosen, arguments, width)


def _case(fn, name, dtype, chosen, arguments, width) -> AotCase:
    case = make_case(
        fn, name, dtype, arguments, warps=chosen.num_warps, stages=chosen.num_stages, maxnreg=MAX_REGISTERS
    )  # fmt: skip
    return case._replace(resident=RESIDENT if dtype.itemsize == 2 and width <= RESIDENT_WIDTH else 1)
