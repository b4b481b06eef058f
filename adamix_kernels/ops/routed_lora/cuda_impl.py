"""C++/CUDA backend of routed LoRA: csrc/routed_lora. One launch forward, at most three backward."""

from __future__ import annotations

import torch

from ..._extension import unsupported

__all__ = ["backward", "forward", "unsupported"]

_ops = torch.ops.adamix_cuda


def forward(x, lora_a, lora_b, a_index, b_index, base, seed, scaling, groups, offsets, dropout_p, inplace=False):
    arguments = (x, lora_a, lora_b, a_index, b_index, base, seed, scaling, groups, offsets, dropout_p)
    if inplace:
        return base, _ops.routed_lora_forward_(*arguments)
    return _ops.routed_lora_forward(*arguments)


def backward(
    grad_out, x, t, lora_a, lora_b, a_index, b_index, seed,
    need_x, need_a, need_b, scaling, groups, offsets, dropout_p,
):  # fmt: skip
    return _ops.routed_lora_backward(
        grad_out, x, t, lora_a, lora_b, a_index, b_index, seed,
        need_x, need_a, need_b, scaling, groups, offsets, dropout_p,
    )  # fmt: skip
