"""What the routed modules share: bank sizes, merge scores, shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..functional import merge_experts
from ..ops.merge.api import merge_banks
from ..routing import Router

SHARES = ("up", "down", None)


def check_finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, expected a finite number")


def check_fraction(name: str, value: object) -> None:
    """A probability of dropping."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}: got {value!r}, expected 0 <= {name} < 1")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected True or False")


def lora_scaling(alpha: float, r: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r): rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def check_router(router: object) -> Router:
    """`router`, or one of its own for None."""
    if router is not None and not isinstance(router, Router):
        raise TypeError(f"router: got a {type(router).__name__}, expected a Router or None")
    return Router() if router is None else router


def check_input(x: object, features: int) -> None:
    """x is [..., features], floating."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype}, expected a floating dtype")
    if x.dim() < 2 or x.shape[-1] != features:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, S, {features}] or [N, {features}]")


def bank_sizes(num_experts: int, share: str | None) -> tuple[int, int]:
    """(Md, Mu): the experts of the down (A) and the up (B) side."""
    if share not in SHARES:
        raise ValueError(f"share: got {share!r}, expected one of {', '.join(map(repr, SHARES))}")
    return (1 if share == "down" else num_experts), (1 if share == "up" else num_experts)


def merge_score(num_experts: int, device: torch.device | None) -> nn.Parameter:
    """Zero scores, frozen: softmax of them is the uniform mean. Always float32."""
    return nn.Parameter(torch.zeros(num_experts, device=device, dtype=torch.float32), requires_grad=False)


def merged_bank(bank: torch.Tensor, score: torch.Tensor, backend: str) -> torch.Tensor:
    """[M, ...] -> [1, ...]: the softmax(score)-weighted mean, as a bank of one."""
    if bank.shape[0] == 1:
        return bank
    return merge_experts(bank, score, backend=backend).unsqueeze(0)


def merged_banks(banks: Sequence[torch.Tensor], scores: Sequence[torch.Tensor], backend: str) -> list[torch.Tensor]:
    """merged_bank of every pair, in one launch on a GPU; without gradients."""
    several = [n for n, bank in enumerate(banks) if bank.shape[0] > 1]
    out = list(banks)
    means = merge_banks([banks[n] for n in several], [scores[n] for n in several], backend=backend)
    for n, mean in zip(several, means, strict=True):
        out[n] = mean.unsqueeze(0)
    return out


def as_batch(x: torch.Tensor) -> torch.Tensor:
    """[B, ..., H] -> [B, S, H]; rows [N, H] are samples of one token."""
    if x.dim() == 3:
        return x
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, S, H] or [N, H]")
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def cast_like(x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Trainable banks stay float32 while a 16-bit model runs: they are cast to x's dtype for the call."""
    return tuple(t if t.dtype == x.dtype else t.to(x.dtype) for t in tensors)
