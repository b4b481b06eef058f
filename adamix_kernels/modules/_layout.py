"""Layers that are given their tokens otherwise than [B, S, H]: as rows [B * S, H], before the samples, or mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._banks import as_batch

if TYPE_CHECKING:
    from .adapter import RoutedAdapter
    from .lora import RoutedLoRALinear


def turned(x: torch.Tensor) -> torch.Tensor:
    """[S, B, H] -> [B, S, H], and back."""
    return x.transpose(0, 1).contiguous() if x.dim() == 3 else x


def as_rows(layer: RoutedAdapter | RoutedLoRALinear, x: torch.Tensor) -> torch.Tensor:
    """as_batch(x); [N, H] -> [B, N / B, H] in a model's forward of B samples, else [N, 1, H], samples of one token."""
    if x.dim() == 3:
        return x
    if x.dim() != 2:
        return as_batch(x)
    samples = layer.router.samples_in(x.shape[0])
    return x.unsqueeze(1) if samples == x.shape[0] else x.reshape(samples, x.shape[0] // samples, x.shape[1])


def like_rows(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x [..., N] of the tokens that `rows` [B, S, H] are, as [B, S, N]."""
    return x if x.dim() == 3 else x.reshape(*rows.shape[:2], x.shape[-1])


def refuse_gathered(layer: RoutedAdapter | RoutedLoRALinear) -> None:
    """Raises ValueError for experts of a pass or a sample in a layer that is given tokens of all samples."""
    if layer.router.is_by_sample(layer.training):
        raise ValueError(
            f"routing: got experts of a pass or a sample for {layer.place!r}, which is given the tokens that chose it, "
            "of all samples, expected 'token', one expert for all, num_experts=1 or other target_modules"
        )
