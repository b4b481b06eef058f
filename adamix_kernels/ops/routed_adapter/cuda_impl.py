"""C++/CUDA backend of the routed adapter: csrc/routed_adapter. One launch forward, at most three backward."""

from __future__ import annotations

import torch

from ..._extension import unsupported

__all__ = ["backward", "forward", "unsupported"]

_ops = torch.ops.adamix_cuda


def forward(x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual, add_input, activation):
    return _ops.routed_adapter_forward(
        x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual, add_input, activation
    )


def backward(
    grad_out, x, pre, down_weight, up_weight, down_index, up_index,
    need_input, need_down, need_up, add_input, activation,
):  # fmt: skip
    return _ops.routed_adapter_backward(
        grad_out, x, pre, down_weight, up_weight, down_index, up_index,
        need_input, need_down, need_up, add_input, activation,
    )  # fmt: skip
