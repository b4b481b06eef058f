"""The arguments of merging's ops, in order: schemas, fakes and backends go by these lists."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Experts(NamedTuple):
    """scores None: the uniform mean."""

    bank: torch.Tensor
    scores: torch.Tensor | None


class ExpertsBackward(NamedTuple):
    """Experts, with the gradient of what was merged."""

    grad_out: torch.Tensor
    bank: torch.Tensor
    scores: torch.Tensor | None
    need_bank: bool
    need_scores: bool


class Banks(NamedTuple):
    """Experts of every bank."""

    banks: list[torch.Tensor]
    scores: list[torch.Tensor | None]


class LoRA(NamedTuple):
    """lora_a [Ma, groups*r, K] and lora_b [Mb, groups*Ng, r] are banks, of one expert for plain factors."""

    weight: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    groups: int
    offsets: list[int]
    fan_in_fan_out: bool


class LoRAs(NamedTuple):
    """LoRA, of layers whose weights, and whose factors, are alike."""

    weights: list[torch.Tensor]
    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    scaling: float
    groups: int
    offsets: list[int]
    fan_in_fan_out: bool


class LoRABackward(NamedTuple):
    """The weight's gradient is grad_out itself."""

    grad_out: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    need_a: bool
    need_b: bool
    scaling: float
    groups: int
    offsets: list[int]
    fan_in_fan_out: bool
