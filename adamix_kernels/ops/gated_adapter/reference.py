"""Reference backend of the gated adapter: explicit forward and backward in plain PyTorch.

A bias up is one more row of its expert's weight, met by one more column of h, which is what weighs it.
"""

from __future__ import annotations

import torch

from .._gated_matmul import bank_grad, narrow, widen
from .._gated_mix import Mix, gates_grad


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
    pre = narrow(x, down_weight, down_bias, down_index)  # [B, S, slots, r]
    experts = down_weight.shape[0], up_weight.shape[0]
    mixed = Mix.of(x, experts, (down_index, up_index), gates, None, 1.0, mix)
    h = mixed.forward(pre, activation, up_bias is not None)
    out = widen(h, _up_bank(up_weight, up_bias), up_index)
    if add_input:
        out = out.add_(x)
    elif residual is not None:
        out = out.add_(residual)
    return out.contiguous(), pre.flatten(2).contiguous()


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
    dx, ddown_weight, ddown_bias, dup_weight, dup_bias = (x.new_empty(0) for _ in range(5))
    dgates = gates.new_empty(0)
    experts = down_weight.shape[0], up_weight.shape[0]
    mixed = Mix.of(x, experts, (down_index, up_index), gates, None, 1.0, mix)
    slots = 1 if experts[0] == 1 else gates.shape[-1]
    pre = pre.view(*x.shape[:2], slots, down_weight.shape[1])
    if need_up:
        h = mixed.forward(pre, activation, constant=True)
        grads = bank_grad(h, grad_out, experts[1], up_index)  # [Mu, r + 1, Hout]
        dup_weight, dup_bias = grads[:, :-1].mT.contiguous(), grads[:, -1].contiguous()
    if need_input or need_down or need_gates:
        dh = narrow(grad_out, _up_bank(up_weight, up_bias), None, up_index)
        dpre, by_row = mixed.backward(dh, pre, activation, up_bias is not None)
        dgates = gates_grad(by_row, gates) if need_gates else dgates
        if need_down:
            ddown_weight = bank_grad(dpre, x, experts[0], down_index)
            ddown_bias = bank_grad(dpre, x.new_ones(*x.shape[:2], 1), experts[0], down_index).squeeze(2)
        if need_input:
            dx = widen(dpre, down_weight, down_index)
            dx = dx.add_(grad_out) if add_input else dx
    return dx.contiguous(), ddown_weight, ddown_bias, dup_weight, dup_bias, dgates


def _up_bank(up_weight: torch.Tensor, up_bias: torch.Tensor | None) -> torch.Tensor:
    """[Mu, r, Hout], or [Mu, r + 1, Hout] with the bias last."""
    bank = up_weight.mT
    return bank if up_bias is None else torch.cat((bank, up_bias.unsqueeze(1)), 1)
