"""C++/CUDA backend of routed LoRA: csrc/routed_lora. One launch forward, at most three backward."""

from __future__ import annotations

import torch

from ..._extension import unsupported

__all__ = ["backward", "forward", "unsupported"]

_ops = torch.ops.adamix_cuda


def forward(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    base: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (x, lora_a, lora_b, a_index, b_index, base, seed, scaling, groups, offsets, dropout_p)
    if inplace and base is not None:
        return base, _ops.routed_lora_forward_(*arguments)
    return _ops.routed_lora_forward(*arguments)


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    seed: torch.Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _ops.routed_lora_backward(
        grad_out, x, t, lora_a, lora_b, a_index, b_index, seed,
        need_x, need_a, need_b, scaling, groups, offsets, dropout_p,
    )  # fmt: skip
