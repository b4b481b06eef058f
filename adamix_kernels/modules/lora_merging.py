"""Many LoRA layers merged at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops.merge.api import merge_lora_banks
from ._banks import merged_banks
from .lora import RoutedLoRALinear

Factors = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def merge_layers(
    layers: Sequence[RoutedLoRALinear], into: Sequence[bool]
) -> tuple[list[Factors], list[torch.Tensor | None]]:
    """([layer.merged_factors() for each], [layer.merged_weight() for each whose `into` says so, else None]).

    Layers that are alike take one launch on a GPU, or one for the factors of all and one for their weights. The results
    may share one allocation, never an element.
    """
    factors: dict[int, Factors] = {}
    weights: list[torch.Tensor | None] = [None] * len(layers)
    for backend in sorted({layer.backend for layer in layers}):
        mine = [n for n, layer in enumerate(layers) if layer.backend == backend]
        whole, narrow = ([n for n in mine if into[n] == both] for both in (True, False))
        merged, means = merge_lora_banks(
            [layers[n].with_weight((layers[n].lora_a, layers[n].lora_b)) for n in whole],
            [(layers[n].a_score, layers[n].b_score) for n in whole],
            backend=backend,
        )
        factors |= dict(zip(whole, means, strict=True))
        for n, weight in zip(whole, merged, strict=True):
            weights[n] = weight
        banks = [bank for n in narrow for bank in (layers[n].lora_a, layers[n].lora_b)]
        scores = [score for n in narrow for score in (layers[n].a_score, layers[n].b_score)]
        out = merged_banks(banks, scores, backend)
        factors |= {n: (a[0], b[0]) for n, a, b in zip(narrow, out[::2], out[1::2], strict=True)}
    return [factors[n] for n in range(len(layers))], weights
