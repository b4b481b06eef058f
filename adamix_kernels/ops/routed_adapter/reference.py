"""Reference backend of the routed adapter: explicit forward and backward in plain PyTorch."""

from __future__ import annotations

import torch

from .._activations import activate, activate_backward
from .._routed_matmul import bias_grad, project, project_back, weight_grad


def forward(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    residual: torch.Tensor | None,
    add_input: bool,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    pre = project(x, down_weight, down_bias, down_index)
    out = project(activate(pre, activation), up_weight, up_bias, up_index)
    if add_input:
        out = out.add_(x)
    elif residual is not None:
        out = out.add_(residual)
    return out, pre.contiguous()


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    need_input: bool,
    need_down: bool,
    need_up: bool,
    add_input: bool,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, ddown_weight, ddown_bias, dup_weight, dup_bias = (x.new_empty(0) for _ in range(5))
    if need_up:
        dup_weight = weight_grad(grad_out, activate(pre, activation), up_weight.shape[0], up_index)
        dup_bias = bias_grad(grad_out, up_weight.shape[0], up_index)
    if need_input or need_down:
        dpre = activate_backward(project_back(grad_out, up_weight, up_index), pre, activation)
        if need_down:
            ddown_weight = weight_grad(dpre, x, down_weight.shape[0], down_index)
            ddown_bias = bias_grad(dpre, down_weight.shape[0], down_index)
        if need_input:
            dx = project_back(dpre, down_weight, down_index)
            dx = dx.add_(grad_out) if add_input else dx
    return dx.contiguous(), ddown_weight, ddown_bias, dup_weight, dup_bias
