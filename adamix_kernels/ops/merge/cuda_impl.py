"""C++/CUDA backend of merging: csrc/merge.

Launches: one for the mean of a bank, and for a list of up to 112 banks; for its gradient one, two where scores learn;
one for LoRA, banks of factors included. LoRA's gradients are PyTorch's matmuls.
"""

from __future__ import annotations

import torch

from ..._extension import unsupported
from ._wide import lora_backward

__all__ = ["banks_forward", "experts_backward", "experts_forward", "lora_backward", "lora_forward", "unsupported"]

_ops = torch.ops.adamix_cuda


def experts_forward(bank, scores):
    return _ops.merge_experts_forward(bank, scores)


def banks_forward(banks, scores):
    return _ops.merge_banks_forward(banks, scores)


def experts_backward(grad_out, bank, scores, need_bank, need_scores):
    return _ops.merge_experts_backward(grad_out, bank, scores, need_bank, need_scores)


def lora_forward(weight, lora_a, lora_b, scaling, groups, offsets, fan_in_fan_out):
    return _ops.merge_lora_forward(weight, lora_a, lora_b, scaling, groups, offsets, fan_in_fan_out)
