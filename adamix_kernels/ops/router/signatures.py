"""The arguments of the router's ops, in order: schemas, fakes and backends go by these lists."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Forward(NamedTuple):
    """weight and bias: x's dtype, or float32. top_k 0: dense."""

    x: torch.Tensor  # [..., H]
    weight: torch.Tensor  # [M, H]
    bias: torch.Tensor | None  # [M]
    top_k: int


class Backward(NamedTuple):
    """A gradient that is None is zero. gates, indices: what the forward returned, indices [0] where dense."""

    grad_gates: torch.Tensor | None  # [..., K], or [..., M]
    grad_logits: torch.Tensor | None  # [..., M]
    x: torch.Tensor
    weight: torch.Tensor
    gates: torch.Tensor
    indices: torch.Tensor
    need_x: bool
    need_weight: bool
    need_bias: bool
