"""What the routed modules share: bank sizes, merge scores, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..functional import merge_experts
from ..ops.merge.api import merge_banks

SHARES = ("up", "down", None)


def check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected an int of at least 1")


def bank_sizes(num_experts: int, share: str | None) -> tuple[int, int]:
    """(Md, Mu): the experts of the down (A) and the up (B) side."""
    if share not in SHARES:
        raise ValueError(f"share: got {share!r}, expected one of {', '.join(map(repr, SHARES))}")
    return (1 if share == "down" else num_experts), (1 if share == "up" else num_experts)


def merge_score(num_experts: int, device: torch.device | None) -> nn.Parameter:
    """Zero scores, frozen: softmax of them is the uniform mean. Always float32."""
    return nn.Parameter(torch.zeros(num_experts, device=device, dtype=torch.float32), requires_grad=False)


def merged_bank(bank: torch.Tensor | None, score: torch.Tensor, backend: str) -> torch.Tensor | None:
    """[M, ...] -> [1, ...]: the softmax(score)-weighted mean, as a bank of one."""
    if bank is None or bank.shape[0] == 1:
        return bank
    return merge_experts(bank, score, backend=backend).unsqueeze(0)


def merged_banks(
    banks: Sequence[torch.Tensor], scores: Sequence[torch.Tensor], backend: str
) -> list[torch.Tensor]:  # fmt: skip
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


def fold_passes(rows: torch.Tensor, passes: int) -> torch.Tensor:
    """[B, S, H] -> [passes, B/passes * S, H], where every sample of a pass goes to the same expert; 0: as it is."""
    if passes == 0:
        return rows
    batch, tokens, hidden = rows.shape
    return rows.reshape(passes, batch // passes * tokens, hidden)


def cast_like(x: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Trainable banks stay float32 while a 16-bit model runs: they are cast to x's dtype for the call."""
    return tuple(t if t is None or t.dtype == x.dtype else t.to(x.dtype) for t in tensors)
