"""Many LoRA layers merged at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops.merge.api import merge_loras
from ._banks import merged_banks
from .lora import RoutedLoRALinear


@torch.no_grad()
def merge_factors(layers: Sequence[RoutedLoRALinear]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[layer.merged_factors() for each], the banks of all of one backend merged together (one launch on a GPU)."""
    merged: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for backend in sorted({layer.backend for layer in layers}):
        mine = [n for n, layer in enumerate(layers) if layer.backend == backend]
        banks = [bank for n in mine for bank in (layers[n].lora_a, layers[n].lora_b)]
        scores = [score for n in mine for score in (layers[n].a_score, layers[n].b_score)]
        out = merged_banks(banks, scores, backend)
        merged |= {n: (a[0], b[0]) for n, a, b in zip(mine, out[::2], out[1::2], strict=True)}
    return [merged[n] for n in range(len(layers))]


@torch.no_grad()
def merge_weights(
    layers: Sequence[RoutedLoRALinear], factors: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> list[torch.Tensor]:
    """[layer.merged_weight(its factors) for each], all that are alike together (one launch on a GPU).

    The results may share one allocation, never an element.
    """
    merged: dict[int, torch.Tensor] = {}
    for backend in sorted({layer.backend for layer in layers}):
        mine = [n for n, layer in enumerate(layers) if layer.backend == backend]
        weights = merge_loras([layers[n].with_weight(factors[n]) for n in mine], backend=backend)
        merged |= dict(zip(mine, weights, strict=True))
    return [merged[n] for n in range(len(layers))]
