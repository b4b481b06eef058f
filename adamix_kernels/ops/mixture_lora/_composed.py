"""The mixture as two ops of a backend, one after the other: the router, and the LoRA weighed by its gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .signatures import Forward


def composed(
    route: Callable[..., Any], weigh: Callable[..., Any], arguments: Sequence[Any], inplace: bool
) -> tuple[torch.Tensor, ...]:
    """route, weigh: a backend's forward of the router and of gated LoRA. What the op returns."""
    a = Forward(*arguments)
    gates, index, logits = route(a.x, a.router, None, a.top_k)
    indices = chosen(a, index)
    options = a.scaling, a.groups, a.offsets, a.dropout_p, "outputs"
    out, t = weigh(a.x, a.lora_a, a.lora_b, *indices, gates, None, a.base, a.seed, *options, inplace=inplace)
    return out, t, gates, index, logits


def chosen(a: Any, index: torch.Tensor) -> list[torch.Tensor | None]:
    """The indices of gated LoRA: None where gates are dense, and of a bank of one."""
    return [index if a.top_k and bank.shape[0] > 1 else None for bank in (a.lora_a, a.lora_b)]
