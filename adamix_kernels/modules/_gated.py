"""What both routed modules do with a router of gates: ask it, and make one expert of many by the mean gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..routing import ArrowRouter, GateRouter, Gates

if TYPE_CHECKING:
    from .adapter import RoutedAdapter
    from .lora import RoutedLoRALinear


def check_gate(gate: object, num_experts: int, backend: str) -> GateRouter | None:
    """`gate`, which from here on uses the layer's backend."""
    if gate is None:
        return None
    if not isinstance(gate, GateRouter):
        raise TypeError(f"gate: got a {type(gate).__name__}, expected a GateRouter or None")
    if gate.num_experts != num_experts:
        raise ValueError(f"gate: got one of {gate.num_experts} experts, expected num_experts={num_experts}")
    gate.backend = backend
    return gate


def gates_of(layer: RoutedAdapter | RoutedLoRALinear, x: torch.Tensor, rows: torch.Tensor) -> Gates:
    """The gates of rows [B, S, K], which x is as the layer was given it. Each bank takes the index, or is of one."""
    gate = layer.gate
    assert gate is not None
    if x.dim() != 3 and not gate.per_token:
        raise ValueError(
            f"x: got shape {tuple(x.shape)} at {layer.place or type(layer).__name__}, expected [B, S, K]: gates per "
            "sample cannot tell samples from tokens there"
        )
    tasks = layer.router.tasks_of(rows.shape[0], layer.training)
    found: Gates = gate(rows, mask_of(layer, rows), tasks)
    return found


def mask_of(layer: RoutedAdapter | RoutedLoRALinear, rows: torch.Tensor) -> torch.Tensor | None:
    """Which of the tokens of rows [B, S, K] are no padding, as far as the model was told."""
    told = layer.router.told()
    mask = told.decoder_mask if layer.decodes else told.attention_mask
    if mask is not None and mask.shape != rows.shape[:2] and mask.numel() == rows.shape[0] * rows.shape[1]:
        mask = mask.reshape(rows.shape[:2])
    if mask is not None and mask.device != rows.device:  # layers of one model on several devices
        mask = mask.to(rows.device)
    return mask


@torch.no_grad()
def mean_factors(layer: RoutedLoRALinear) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [G*R, K], B [G*Ng, R]) of s sum_e g_e B_e A_e at the mean gates g.

    R is r where one average says it (a bank of one, or mix "weights"); else M*r: the experts side by side, without the
    cross terms that an average of A and of B would have.
    """
    weights = _weights(layer)
    a, b = layer.lora_a, layer.lora_b
    groups, (experts, _, columns), r = layer.groups, a.shape, layer.r
    if layer.mix == "weights" or 1 in (a.shape[0], b.shape[0]):
        return _average(a, weights), _average(b, weights)
    wide = a.view(experts, groups, r, columns).transpose(0, 1).reshape(groups * experts * r, columns)
    scaled = (b * weights.view(-1, 1, 1)).to(b.dtype)
    return wide, scaled.transpose(0, 1).reshape(b.shape[1], experts * r)


@torch.no_grad()
def mean_banks(adapter: RoutedAdapter) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(down_weight [R, H], down_bias [R], up_weight [H, R], up_bias [H]) at the mean gates; R as in mean_factors."""
    weights = _weights(adapter)
    down_weight, down_bias, up_weight, up_bias = adapter.banks()
    bias = _average(up_bias, weights)
    if adapter.mix == "weights" or down_weight.shape[0] == 1:
        return _average(down_weight, weights), _average(down_bias, weights), _average(up_weight, weights), bias
    ups = (up_weight * weights.view(-1, 1, 1)).to(up_weight.dtype)  # a bank of one is spread
    return down_weight.flatten(0, 1), down_bias.flatten(), ups.transpose(0, 1).flatten(1), bias


def _weights(layer: RoutedAdapter | RoutedLoRALinear) -> torch.Tensor:
    assert layer.gate is not None
    return layer.gate.mean_gates


def _average(bank: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if bank.shape[0] == 1:
        return bank[0].detach().clone()
    return torch.einsum("m,m...->...", weights.double(), bank.double()).to(bank.dtype)


def refreshed(layer: RoutedLoRALinear) -> None:
    """Tells Arrow what the experts are now."""
    if isinstance(layer.gate, ArrowRouter):
        layer.gate.refresh(layer.lora_a, layer.lora_b, layer.output_offsets)
