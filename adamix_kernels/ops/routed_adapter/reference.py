"""Reference backend of the routed adapter: explicit forward and backward in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from .._activations import activate, activate_backward
from .._routed_matmul import bias_grad, project, project_back, weight_grad
from .signatures import Backward, Forward


def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a = Forward(*arguments)
    pre = project(a.x, a.down_weight, a.down_bias, a.down_index)
    out = project(activate(pre, a.activation), a.up_weight, a.up_bias, a.up_index)
    if a.add_input:
        out = out.add_(a.x)
    elif a.residual is not None:
        out = out.add_(a.residual)
    return out, pre.contiguous()


def backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    a = Backward(*arguments)
    dx, ddown_weight, ddown_bias, dup_weight, dup_bias = (a.x.new_empty(0) for _ in range(5))
    if a.need_up:
        dup_weight = weight_grad(a.grad_out, activate(a.pre, a.activation), a.up_weight.shape[0], a.up_index)
        dup_bias = bias_grad(a.grad_out, a.up_weight.shape[0], a.up_index)
    if a.need_input or a.need_down:
        dpre = activate_backward(project_back(a.grad_out, a.up_weight, a.up_index), a.pre, a.activation)
        if a.need_down:
            ddown_weight = weight_grad(dpre, a.x, a.down_weight.shape[0], a.down_index)
            ddown_bias = bias_grad(dpre, a.down_weight.shape[0], a.down_index)
        if a.need_input:
            dx = project_back(dpre, a.down_weight, a.down_index)
            dx = dx.add_(a.grad_out) if a.add_input else dx
    return dx.contiguous(), ddown_weight, ddown_bias, dup_weight, dup_bias
