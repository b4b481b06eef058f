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


class PlainLoRA(nn.Module):
    """base(x) + scaling B(A(x)) on the q and v thirds of a fused qkv layer [H -> 3H]: four products, no routing."""

    def __init__(self, base: nn.Module, hidden: int, r: int, scaling: float):
        super().__init__()
        self.base, self.scaling = base, scaling
        self.down = nn.Linear(hidden, 2 * r, bias=False)
        self.up_q, self.up_v = (nn.Linear(r, hidden, bias=False) for _ in range(2))
        for up in (self.up_q, self.up_v):
            nn.init.zeros_(up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.base(x).chunk(3, -1)
        down_q, down_v = self.down(x).chunk(2, -1)
        q = q + self.scaling * self.up_q(down_q)
        return torch.cat([q, k, v + self.scaling * self.up_v(down_v)], -1)


def lora_rank(bottleneck: int) -> int:
    """Rank at which LoRA on query and value holds as many weights as one adapter: 2 H r = 2 (2 H rank)."""
    return max(1, bottleneck // 2)


def peft_lora(model: nn.Module, bottleneck: int, *, lora: bool = False) -> nn.Module:
    """`model` with PEFT LoRA: rank lora_rank(bottleneck) on query and value, or for GPT-2 (`lora`) rank
    `bottleneck` on all of c_attn, the least that PEFT adapts there. ImportError where peft is not installed.
    """
    from peft import LoraConfig, get_peft_model

    if lora:
        options = dict(r=bottleneck, target_modules=["c_attn"], fan_in_fan_out=True)
    else:
        options = dict(r=lora_rank(bottleneck), target_modules=["query", "value"])
    config = LoraConfig(lora_alpha=2 * options["r"], lora_dropout=0.0, **options)
    return get_peft_model(model, config)
