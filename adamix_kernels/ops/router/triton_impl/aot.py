"""What the ahead-of-time gate compiles: dense and top 2, of few experts and of the most, weights of either dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...._triton_utils import DTYPES
from ..._triton_aot import POINTERS, AotCase, make_case
from .forward import router_kernel
from .plan import ROWS, features_at_once, padded, stages


def aot_cases(capability: int = 90) -> Iterator[AotCase]:
    """Every case; the tiles are the same on every GPU."""
    for dtype, pointer in POINTERS.items():
        for experts, top_k, wide in ((8, 0, True), (8, 2, False), (256, 0, False), (256, 2, True)):
            weight = "*fp32" if wide else pointer
            arguments = dict(
                x=pointer, weight=weight, bias=weight if experts == 8 else None, gates="*fp32",
                index="*i64" if top_k else None, logits="*fp32", rows="i32", features="i32",
                EXPERTS=experts, TOP_K=top_k, PADDED=padded(experts), SLOTS=max(1, top_k), ROWS=ROWS,
                FEATURES=features_at_once(experts, dtype), DOT=DTYPES[dtype],
                PRECISION="tf32x3" if dtype == torch.float32 else "ieee",
            )  # fmt: skip
            steps = stages(experts, dtype, torch.float32 if wide else dtype)
            name = f"m{experts}_{f'top{top_k}' if top_k else 'dense'}{'_wide' if wide else ''}"
            yield make_case(router_kernel, name, dtype, arguments, ("features",), stages=steps)
