"""The arguments of the routed adapter's ops, in order: schemas, fakes and backends go by these lists."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Forward(NamedTuple):
    """add_input: the residual is x itself."""

    x: torch.Tensor  # [B, S, H]
    down_weight: torch.Tensor  # [Md, r, H]
    down_bias: torch.Tensor | None
    up_weight: torch.Tensor  # [Mu, Hout, r]
    up_bias: torch.Tensor | None
    down_index: torch.Tensor | None
    up_index: torch.Tensor | None
    residual: torch.Tensor | None  # [B, S, Hout]
    add_input: bool
    activation: str


class Backward(NamedTuple):
    """pre: what the forward returned, [B, S, r]."""

    grad_out: torch.Tensor
    x: torch.Tensor
    pre: torch.Tensor
    down_weight: torch.Tensor
    up_weight: torch.Tensor
    down_index: torch.Tensor | None
    up_index: torch.Tensor | None
    need_input: bool
    need_down: bool
    need_up: bool
    add_input: bool
    activation: str
