"""C++/CUDA backend of merging: csrc/merge.

Launches: one for the mean of a bank, and for a list of up to 112 banks; for its gradient one, two where scores learn;
one for LoRA, and for a list of up to 96 layers that are alike, banks of factors included: on matrix units where the
weight is of 16 bits, the factors are single ones of its dtype or of float32 (each number as two of bfloat16, in three
products), and all is aligned. Where A alone is a bank, `lora_banks_forward` makes and writes its rounded mean in that
launch, too. LoRA's gradients are PyTorch's matmuls.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch

from ..._extension import merge_most as most
from ..._extension import unsupported
from ._results import Results
from ._wide import lora_backward

__all__ = [
    "banks_forward",
    "experts_backward",
    "experts_forward",
    "lora_backward",
    "lora_banks_forward",
    "lora_forward",
    "loras_forward",
    "most",
    "unsupported",
]

_ops = torch.ops.adamix_cuda


def experts_forward(bank: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
    return _ops.merge_experts_forward(bank, scores)


def banks_forward(
    banks: list[torch.Tensor], scores: list[torch.Tensor | None], results: Results | None = None
) -> list[torch.Tensor]:
    if results is None:
        results = Results([bank.shape[1:] for bank in banks], banks[0].dtype, banks[0].device)
    merged = results.merged(banks, scores)
    if merged is not None:
        return merged
    given = scores if any(map(operator.is_not, scores, itertools.repeat(None))) else []
    return results.split(_ops.merge_banks_forward(banks, given, results.offsets, results.elements))


def experts_backward(
    grad_out: torch.Tensor, bank: torch.Tensor, scores: torch.Tensor | None, need_bank: bool, need_scores: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _ops.merge_experts_backward(grad_out, bank, scores, need_bank, need_scores)


def lora_forward(*arguments: Any) -> torch.Tensor:
    return _ops.merge_lora_forward(*arguments)


def loras_forward(*arguments: Any) -> torch.Tensor:
    return _ops.merge_loras_forward(*arguments)


def lora_banks_forward(
    weights: list[torch.Tensor], lora_a: list[torch.Tensor], lora_b: list[torch.Tensor], a_scores: list[torch.Tensor],
    b_scores: list[torch.Tensor], *options: Any,
) -> tuple[torch.Tensor, ...] | None:  # fmt: skip
    """Of banks A; no layer's bank B."""
    weight, mean = _ops.merge_lora_banks_forward(weights, lora_a, lora_b, a_scores, *options)
    return (weight, mean, mean) if weight.numel() else None
