"""Single adapters that AdaMix is compared with: a plain bottleneck adapter, and LoRA from PEFT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PlainAdapter(nn.Module):
    """x -> x + up(gelu(down(x))) on the output of `base`: two nn.Linear, no routing."""

    def __init__(self, base: nn.Module, hidden: int, bottleneck: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(hidden, bottleneck)
        self.up = nn.Linear(bottleneck, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        return self.up(F.gelu(self.down(out))) + out


def lora_rank(bottleneck: int) -> int:
    """Rank at which LoRA on query and value holds as many weights as one adapter: 2 H r = 2 (2 H rank)."""
    return max(1, bottleneck // 2)


def peft_lora(model: nn.Module, bottleneck: int) -> nn.Module:
    """`model` with PEFT LoRA on query and value; ImportError where peft is not installed."""
    from peft import LoraConfig, get_peft_model

    rank = lora_rank(bottleneck)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], lora_dropout=0.0)
    return get_peft_model(model, config)
