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

    def __init__(self, in_features: int, out_features: int, num_experts: int, bias: bool = True):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(in_features, out_features, bias=bias) for _ in range(num_experts))
        self.chosen: int | None = None

    def pick(self) -> nn.Linear:
        """The expert of this call."""
        drawn = torch.randint(low=0, high=len(self.experts), size=(1,)).item()
        return self.experts[drawn if self.chosen is None else self.chosen]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pick()(x)


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


class OriginalLoRA(nn.Module):
    """base(x) + scaling B(A(x)) on q and v of a fused qkv layer [H -> 3H], A and B each a drawn expert.

    A: [2r, H]. B: [2H, r], a grouped 1x1 convolution whose 2H columns are then scattered into zeros of 3H.
    """

    def __init__(self, base: nn.Module, hidden: int, r: int, scaling: float, num_a: int, num_b: int):
        super().__init__()
        self.base, self.scaling = base, scaling
        self.down = ExpertList(hidden, 2 * r, num_a, bias=False)
        self.up = ExpertList(r, 2 * hidden, num_b, bias=False)
        for expert in self.up.experts:
            nn.init.zeros_(expert.weight)
        columns = torch.arange(3 * hidden).view(3, hidden)
        self.register_buffer("columns", torch.cat([columns[0], columns[2]]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        after_a = F.linear(x, self.down.pick().weight)
        after_b = F.conv1d(after_a.transpose(-2, -1), self.up.pick().weight.unsqueeze(-1), groups=2).transpose(-2, -1)
        padded = out.new_zeros(out.shape)
        padded[..., self.columns] = after_b.to(out.dtype)
        return out + padded * self.scaling


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


def original_lm_loss(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    experts: tuple[Sequence[int], Sequence[int]] | None = None,
) -> torch.Tensor:
    """`original_loss` of a causal language model: rows are positions, position s predicts label s + 1."""
    rows = []
    for k in range(2):
        if experts is not None:
            _choose(model, experts[k])
        rows.append(model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1))
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    return F.cross_entropy(rows[0].to(wide), labels[:, 1:].flatten()) + symmetric_kl(*rows)


def symmetric_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1/2 [KL(softmax(sg(b))||softmax(a)) + KL(softmax(sg(a))||softmax(b))], mean over the batch, in float32."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    log_a, log_b = F.log_softmax(a, -1, dtype=dtype), F.log_softmax(b, -1, dtype=dtype)
    a_from_b = F.kl_div(log_a, F.softmax(b.detach(), -1, dtype=dtype), reduction="batchmean")
    b_from_a = F.kl_div(log_b, F.softmax(a.detach(), -1, dtype=dtype), reduction="batchmean")
    return 0.5 * (a_from_b + b_from_a)


def _choose(model: nn.Module, experts: Sequence[int]) -> None:
    adapters = [module for module in model.modules() if isinstance(module, (OriginalAdapter, OriginalLoRA))]
    for adapter, expert in zip(adapters, experts, strict=True):
        adapter.down.chosen = expert
