"""Which calls are one launch, and its constants: decided by shapes alone."""

from __future__ import annotations

from ...gated_lora.triton_impl.plan import MAX_SLOTS, constants, in_one_tile, tile_call
from ...routed_lora.triton_impl.plan import Call
from .forward import mixture_lora_forward_kernel

# Columns of a tile of logits.
PADDED = 16


def fits(lora_a, lora_b, router) -> bool:
    """Whether a tile holds all experts' narrow columns and logits."""
    experts = router.shape[0]
    return 1 < experts <= min(PADDED, MAX_SLOTS) and in_one_tile(lora_a, lora_b, None, None, experts, "outputs")


def planned(x, lora_a, lora_b, router, gates, top_k: int, offsets, width: int):
    """(the call, constants, grid) of the kernel; width: the output's columns."""
    call: Call = tile_call(x, lora_a, lora_b, None, None, gates, offsets, width)
    kernel, columns = mixture_lora_forward_kernel, lora_b.shape[1] // len(offsets)
    meta, grid, _ = constants(kernel, call, "lora_forward_kernel", columns, gates, "outputs")
    return call, meta | dict(EXPERTS=router.shape[0], TOP_K=top_k, PADDED=PADDED), grid
