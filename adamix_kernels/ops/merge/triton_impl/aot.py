"""What the ahead-of-time gate compiles: every kernel and dtype, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl

from ...._triton_utils import DTYPES
from ..._triton_aot import POINTERS, AotCase, make_case
from .experts import merge_banks_kernel, merge_experts_grad_kernel, merge_experts_kernel, merge_scores_grad_kernel
from .lora import merge_lora_kernel
from .sizes import BLOCK, SUM_ROWS, grad_block, lora_ranks, lora_tile, padded, unroll


def aot_cases(capability: int = 90) -> Iterator[AotCase]:
    """Every case; the blocks are the same on every GPU. Scores and sums are float32."""
    for dtype, pointer in POINTERS.items():
        for experts in (4, 64):
            yield from _expert_cases(dtype, pointer, experts)
        for fan in (False, True):
            name = "conv1d" if fan else "linear"
            yield _lora_case(pointer, dtype, fan, name)
            yield _lora_case(pointer, dtype, fan, f"{name}_layers", layers=True)
            # A model of 16 bits with experts in float32, which is what the products are in.
            if dtype != torch.float32:
                yield _lora_case(pointer, dtype, fan, f"{name}_banks", layers=True, experts=4)
                yield _lora_case(pointer, torch.float32, fan, f"{name}_{str(dtype).removeprefix('torch.')}")


def _lora_case(
    pointer: str, factors: torch.dtype, fan: bool, name: str, layers: bool = False, experts: int = 1
) -> AotCase:
    """Banks of A, as layers share B."""
    rows, cols, warps, registers = lora_tile(factors, experts)
    arguments = dict(
        scaling="fp32", height="i32", width="i32", OFFSETS=(0, 2048), PER_GROUP=1024, R=16, FAN=fan,
        WIDE=tl.float32, DOT=DTYPES[factors], RANKS=lora_ranks(16), ROWS=rows, COLS=cols,
        places="*i64" if layers else None, UNITS=(16 // factors.itemsize,) * 5 if layers else (1,) * 5,
        a_scores="*fp32" if experts > 1 else None, b_scores=None, a_mean=POINTERS[factors] if experts > 1 else None,
        b_mean=None, MA=experts, MB=1,
    )  # fmt: skip
    arguments |= dict(weight=pointer, out=pointer, lora_a=POINTERS[factors], lora_b=POINTERS[factors])
    return make_case(merge_lora_kernel, name, factors, arguments, ("height", "width"), warps, registers)


def _expert_cases(dtype: torch.dtype, pointer: str, experts: int) -> Iterator[AotCase]:
    wide = dict(PADDED=padded(experts), WIDE=tl.float32)
    for scores in ("*fp32", None):
        arguments = dict(bank=pointer, scores=scores, out=pointer, size="i32", experts="i32")
        name = f"m{experts}_{'scores' if scores else 'uniform'}"
        blocks = dict(UNROLL=unroll(experts), BLOCK=BLOCK)
        yield make_case(merge_experts_kernel, name, dtype, arguments | wide | blocks, ("size",))
        arguments = dict(bank=pointer, grad=pointer, scores=scores, bank_grad=pointer, plane=scores)
        arguments |= dict(size="i32", experts="i32", BLOCK=grad_block(experts))
        yield make_case(merge_experts_grad_kernel, name, dtype, arguments | wide, ("size",))
    arguments = dict(table="*i64", anchor=pointer, results=pointer, score_anchor="*fp32", banks="i32")
    arguments |= dict(BANKS=padded(192), UNIT=16 // dtype.itemsize, BLOCK=BLOCK)
    yield make_case(merge_banks_kernel, f"m{experts}", dtype, arguments | wide | dict(UNROLL=unroll(experts)))
    arguments = dict(plane="*fp32", scores=pointer, scores_grad=pointer, programs="i32", experts="i32")
    arguments |= dict(ROWS=SUM_ROWS // padded(experts))
    yield make_case(merge_scores_grad_kernel, f"m{experts}", dtype, arguments | wide)
