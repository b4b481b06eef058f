"""Triton backend of the mixture: one launch where a tile holds the columns of all experts, else the router's and gated
LoRA's.
"""

from __future__ import annotations

import torch

from ...._triton_utils import launch, memory
from ...._triton_utils import problem as unsupported
from ...gated_lora.triton_impl import forward as weigh
from ...routed_lora.triton_impl.plan import gaps
from ...router.triton_impl import forward as route
from .._composed import composed
from .aot import aot_cases
from .forward import mixture_lora_forward_kernel
from .plan import fits, planned

__all__ = ["aot_cases", "forward", "unsupported"]


def forward(
    x, lora_a, lora_b, router, base, seed, top_k, scaling, groups, offsets, dropout_p, inplace=False
):  # fmt: skip
    if not fits(lora_a, lora_b, router):
        arguments = x, lora_a, lora_b, router, base, seed, top_k, scaling, groups, offsets, dropout_p
        return composed(route, weigh, arguments, inplace)
    batch, tokens, _ = x.shape
    experts, per_group = router.shape[0], lora_b.shape[1] // groups
    width = max(offsets) + per_group if base is None else base.shape[2]
    slots = top_k or experts
    t = memory(x, batch, tokens, (slots if lora_a.shape[0] > 1 else 1) * lora_a.shape[1])
    gates = memory(x, batch, tokens, slots, dtype=torch.float32)
    index = memory(x, *((batch, tokens, slots) if top_k else (0,)), dtype=torch.int64)
    logits = memory(x, batch, tokens, experts, dtype=torch.float32)
    # In place a program reads and writes each element once, and the columns of no group are left alone.
    out = base if inplace else memory(x, batch, tokens, width)
    if batch * tokens:
        x, lora_a, lora_b, router = (z.contiguous() for z in (x, lora_a, lora_b, router))
        base = None if base is None else base.contiguous()
        call, meta, grid = planned(x, lora_a, lora_b, router, gates, top_k, offsets, width)
        _, _, _, threshold, inv_keep, scale = call.scalars(dropout_p, scaling)
        launch(
            mixture_lora_forward_kernel, grid, x.device,
            x, lora_a, lora_b, router, base, seed, out, t, gates, index if top_k else None, logits,
            call.rows, threshold, inv_keep, scale,
            GAPS=() if inplace else gaps(offsets, per_group, width), **meta,
        )  # fmt: skip
    return out, t, gates, index, logits
