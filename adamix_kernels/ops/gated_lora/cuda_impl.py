"""C++/CUDA backend of gated LoRA: csrc/gated. One launch forward, at most three backward."""

from __future__ import annotations

import torch

from ..._extension import unsupported
from .._gated_mix import gates_grad

__all__ = ["backward", "forward", "unsupported"]

_ops = torch.ops.adamix_cuda


def forward(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    gates: torch.Tensor,
    scales: torch.Tensor | None,
    base: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    mix: str,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (
        x, lora_a, lora_b, a_index, b_index, gates, scales, base, seed, scaling, groups, offsets, dropout_p, mix,
    )  # fmt: skip
    if inplace and base is not None:
        return base, _ops.gated_lora_forward_(*arguments)
    return _ops.gated_lora_forward(*arguments)


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    gates: torch.Tensor,
    scales: torch.Tensor | None,
    seed: torch.Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_gates: bool,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    mix: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, da, db, dgates = _ops.gated_lora_backward(
        grad_out, x, t, lora_a, lora_b, a_index, b_index, gates, scales, seed,
        need_x, need_a, need_b, need_gates, scaling, groups, offsets, dropout_p, mix,
    )  # fmt: skip
    return dx, da, db, gates_grad(dgates, gates) if need_gates else dgates
