"""C++/CUDA backend of the gated adapter: csrc/gated. One launch forward, at most three backward."""

from __future__ import annotations

import torch

from ..._extension import unsupported
from .._gated_mix import gates_grad

__all__ = ["backward", "forward", "unsupported"]

_ops = torch.ops.adamix_cuda


def forward(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    gates: torch.Tensor,
    residual: torch.Tensor | None,
    add_input: bool,
    activation: str,
    mix: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _ops.gated_adapter_forward(
        x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, gates, residual, add_input, activation, mix
    )


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    gates: torch.Tensor,
    need_input: bool,
    need_down: bool,
    need_up: bool,
    need_gates: bool,
    add_input: bool,
    activation: str,
    mix: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *grads, dgates = _ops.gated_adapter_backward(
        grad_out, x, pre, down_weight, up_weight, up_bias, down_index, up_index, gates,
        need_input, need_down, need_up, need_gates, add_input, activation, mix,
    )  # fmt: skip
    return (*grads, gates_grad(dgates, gates) if need_gates else dgates)
