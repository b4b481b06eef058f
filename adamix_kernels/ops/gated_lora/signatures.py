"""The arguments of gated LoRA's ops, in order: schemas, fakes and backends go by these lists."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Forward(NamedTuple):
    """Indices are None for dense gates (slot e is expert e) and for a bank of one, seed when dropout_p is 0."""

    x: torch.Tensor  # [B, S, K]
    lora_a: torch.Tensor  # [Ma, groups*r, K]
    lora_b: torch.Tensor  # [Mb, groups*Ng, r]
    a_index: torch.Tensor | None
    b_index: torch.Tensor | None
    gates: torch.Tensor
    scales: torch.Tensor | None  # [M], float32
    base: torch.Tensor | None  # [B, S, N]
    seed: torch.Tensor | None
    scaling: float
    groups: int
    offsets: list[int]
    dropout_p: float
    mix: str


class Backward(NamedTuple):
    """t: what the forward returned, [B, S, slots * groups*r]."""

    grad_out: torch.Tensor
    x: torch.Tensor
    t: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    a_index: torch.Tensor | None
    b_index: torch.Tensor | None
    gates: torch.Tensor
    scales: torch.Tensor | None
    seed: torch.Tensor | None
    need_x: bool
    need_a: bool
    need_b: bool
    need_gates: bool
    scaling: float
    groups: int
    offsets: list[int]
    dropout_p: float
    mix: str
