"""The arguments of mixture_lora's ops, in order: schemas, fakes and backends go by these lists."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Forward(NamedTuple):
    """Each bank is of M experts or of one. seed is None when dropout_p is 0; top_k 0: dense."""

    x: torch.Tensor  # [B, S, K]
    lora_a: torch.Tensor  # [Ma, groups*r, K]
    lora_b: torch.Tensor  # [Mb, groups*Ng, r]
    router: torch.Tensor  # [M, K], x's dtype or float32
    base: torch.Tensor | None  # [B, S, N]
    seed: torch.Tensor | None
    top_k: int
    scaling: float
    groups: int
    offsets: list[int]
    dropout_p: float


class Backward(NamedTuple):
    """A gradient that is None is zero. t, gates, indices: what the forward returned, indices [0] where dense."""

    grad_out: torch.Tensor | None
    grad_gates: torch.Tensor | None
    grad_logits: torch.Tensor | None
    x: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    router: torch.Tensor
    t: torch.Tensor
    gates: torch.Tensor
    indices: torch.Tensor
    seed: torch.Tensor | None
    need_x: bool
    need_a: bool
    need_b: bool
    need_router: bool
    top_k: int
    scaling: float
    groups: int
    offsets: list[int]
    dropout_p: float
