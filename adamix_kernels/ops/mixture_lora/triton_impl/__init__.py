"""Triton backend of the mixture: the router's, then gated LoRA's."""

from __future__ import annotations

from ...._triton_utils import problem as unsupported
from ...gated_lora.triton_impl import forward as weigh
from ...router.triton_impl import forward as route
from .._composed import composed

__all__ = ["forward", "unsupported"]


def forward(
    x, lora_a, lora_b, router, base, seed, top_k, scaling, groups, offsets, dropout_p, inplace=False
):  # fmt: skip
    arguments = x, lora_a, lora_b, router, base, seed, top_k, scaling, groups, offsets, dropout_p
    return composed(route, weigh, arguments, inplace)
