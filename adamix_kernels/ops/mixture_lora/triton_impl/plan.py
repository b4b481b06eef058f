"""Which calls are one launch, and its constants: decided by shapes alone."""

from __future__ import annotations

import torch

from ...gated_lora.triton_impl.plan import MAX_SLOTS, constants, in_one_tile, tile_call
from ...routed_lora.triton_impl.plan import Call, narrow_columns
from .forward import mixture_lora_forward_kernel

# Columns of a tile of logits.
PADDED = 16
# Up to how many narrow columns a router in float32 takes as much shared memory a step as they do, or more.
_AS_NARROW = 2 * PADDED


def fits(lora_a, lora_b, router) -> bool:
    """Whether a tile holds all experts' narrow columns and logits."""
    experts = router.shape[0]
    return 1 < experts <= min(PADDED, MAX_SLOTS) and in_one_tile(lora_a, lora_b, None, None, experts, "outputs")


def steps_ahead(stages: int, width: int, itemsize: int, wide: bool) -> int:
    """num_stages of the kernel, where gated LoRA's at `width` narrow columns has `stages`: two programs have to fit a
    multiprocessor there. wide: the router is in float32."""
    return min(stages, 2) if wide and itemsize == 2 and width <= _AS_NARROW else stages


def planned(x, lora_a, lora_b, router, gates, top_k: int, offsets, width: int):
    """(the call, constants, grid) of the kernel; width: the output's columns."""
    call: Call = tile_call(x, lora_a, lora_b, None, None, gates, offsets, width)
    kernel, columns = mixture_lora_forward_kernel, lora_b.shape[1] // len(offsets)
    meta, grid, _ = constants(kernel, call, "lora_forward_kernel", columns, gates, "outputs")
    wide = router.dtype == torch.float32
    stages = steps_ahead(meta["STAGES"], narrow_columns(call.plan)[1], x.element_size(), wide)
    meta |= dict(EXPERTS=router.shape[0], TOP_K=top_k, PADDED=PADDED, STAGES=stages, num_stages=stages)
    return call, meta, grid
