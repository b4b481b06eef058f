"""What the ahead-of-time gate compiles: gated LoRA's tiles with a router in them, in every shipped configuration."""

from __future__ import annotations

from collections.abc import Iterator

from ...._triton_utils import DTYPES, precision
from ..._routed_plan import power_of_2
from ..._triton_aot import POINTERS, AotCase, make_case
from ...routed_lora.triton_impl.plan import RESIDENT, RESIDENT_WIDTH, row_blocks
from ...routed_lora.triton_impl.tables import MAX_REGISTERS, config
from .forward import mixture_lora_forward_kernel
from .plan import PADDED, steps_ahead

_HIDDEN = 1024
# name -> (experts of A, experts of B, r, top_k, dropout, router in float32)
_TILES = {
    "dense_m8_r8": (8, 8, 8, 0, False, True),
    "top2_m8_r8": (8, 8, 8, 2, False, True),
    "dense_m8_r32": (8, 8, 32, 0, True, False),
    "top2_m16_r16": (16, 16, 16, 2, True, True),
    "hydra_m3_r8": (1, 3, 8, 0, True, True),
    "dense_m2_r8": (2, 2, 8, 0, False, True),
    "one_up_m8_r8": (8, 1, 8, 2, False, False),
}


def aot_cases(capability: int = 90) -> Iterator[AotCase]:
    """Every case with the block sizes shipped for a capability (10 * major + minor)."""
    for dtype in POINTERS:
        for name, shape in _TILES.items():
            for case in _cases(name, dtype, capability, *shape):
                # 12.x has 100 KB of shared memory, where two programs of the widest steps do not fit.
                yield case._replace(resident=1) if capability >= 120 else case


def _cases(name, dtype, capability, of_a, of_b, r, top_k, dropout, wide) -> Iterator[AotCase]:
    rp, pointer = power_of_2(r), POINTERS[dtype]
    arguments = dict.fromkeys((f"{tensor}_ptr" for tensor in ("x", "a", "b", "base", "out", "t")), pointer) | dict(
        router_ptr="*fp32" if wide else pointer, seed_ptr="*i64" if dropout else None, gates_ptr="*fp32",
        index_ptr="*i64" if top_k else None, logits_ptr="*fp32", span="i32", threshold="i32", inv_keep="fp32",
        scaling="fp32", K=_HIDDEN, RANK=r, NG=_HIDDEN, WIDTH=_HIDDEN, OFFSETS=(0,), GAPS=(), RP=rp,
        EXPERTS=max(of_a, of_b), TOP_K=top_k, PADDED=PADDED, DOT=DTYPES[dtype], PRECISION=precision(dtype),
    )  # fmt: skip
    for side, m in (("A", of_a), ("B", of_b)):
        padded = max(power_of_2(max(of_a, of_b)) if m > 1 else 1, 16 // rp)
        arguments |= {f"{side}_EXPERTS": m, f"{side}_PADDED": padded, f"{side}_MASKED": m > 1}
    width = rp * max(arguments["A_PADDED"], arguments["B_PADDED"])
    chosen = config("lora_forward_kernel", capability, dtype.itemsize, width)
    stages = steps_ahead(chosen.num_stages, width, dtype.itemsize, wide)
    for rows in row_blocks(chosen.rows):
        blocks = dict(BLOCK_M=rows, BLOCK_C=chosen.cols, STAGES=stages)
        case = make_case(
            mixture_lora_forward_kernel, f"{name}_rows{rows}", dtype, arguments | blocks,
            warps=chosen.num_warps, stages=stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        yield case._replace(resident=RESIDENT if dtype.itemsize == 2 and width <= RESIDENT_WIDTH else 1)
