"""The published way, transcribed: a list of expert modules, one called per pass, two passes a step.

Kept plain on purpose: this is what the package is measured against, and what it must agree with.
Source: `MixtureSoup`, `ExpertSoup` and `symmetric_KL_loss` of the reference project (microsoft/AdaMix).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class ExpertList(nn.Module):
    """One side: M separate nn.Linear; every forward calls one, drawn on the CPU and read with .item().

    chosen: the expert to use whatever was drawn, or None.
    """

    def __init__(self, in_features: int, out_features: int, num_experts: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(in_features, out_features) for _ in range(num_experts))
        self.chosen: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        drawn = torch.randint(low=0, high=len(self.experts), size=(1,)).item()
        return self.experts[drawn if self.chosen is None else self.chosen](x)


class OriginalAdapter(nn.Module):
    """x -> x + up(gelu(down(x))) on the output of `base`, each side through its own drawn expert."""

    def __init__(self, base: nn.Module, hidden: int, bottleneck: int, num_down: int, num_up: int):
        super().__init__()
        self.base = base
        self.down = ExpertList(hidden, bottleneck, num_down)
        self.up = ExpertList(bottleneck, hidden, num_up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        return self.up(F.gelu(self.down(out))) + out


def original_loss(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    experts: tuple[Sequence[int], Sequence[int]] | None = None,
) -> torch.Tensor:
    """CE(z1, y) + 1/2 [KL(sg(p2)||p1) + KL(sg(p1)||p2)], z1 and z2 from two forwards of the same inputs.

    inputs: the model's arguments, batch B. labels: [B] class ids. experts: for each pass, the down expert
    of each layer; None draws, as published. Returns a scalar.
    """
    if experts is not None:
        _choose(model, experts[0])
    first = model(**inputs).logits
    loss = F.cross_entropy(first.view(-1, first.shape[-1]), labels.view(-1))
    if experts is not None:
        _choose(model, experts[1])
    second = model(**inputs).logits
    return loss + symmetric_kl(first, second)


def symmetric_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1/2 [KL(softmax(sg(b))||softmax(a)) + KL(softmax(sg(a))||softmax(b))], mean over the batch, in float32."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    log_a, log_b = F.log_softmax(a, -1, dtype=dtype), F.log_softmax(b, -1, dtype=dtype)
    a_from_b = F.kl_div(log_a, F.softmax(b.detach(), -1, dtype=dtype), reduction="batchmean")
    b_from_a = F.kl_div(log_b, F.softmax(a.detach(), -1, dtype=dtype), reduction="batchmean")
    return 0.5 * (a_from_b + b_from_a)


def _choose(model: nn.Module, experts: Sequence[int]) -> None:
    adapters = [module for module in model.modules() if isinstance(module, OriginalAdapter)]
    for adapter, expert in zip(adapters, experts, strict=True):
        adapter.down.chosen = expert
