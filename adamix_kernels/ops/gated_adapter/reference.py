"""Reference backend of the gated adapter: explicit forward and backward in plain PyTorch.

A bias up is one more row of its expert's weight, met by one more column of h, which is what weighs it.
"""

from __future__ import annotations

from typing import Any

import torch

from .._gated_matmul import bank_grad, narrow, widen
from .._gated_mix import Mix, gates_grad
from .signatures import Backward, Forward


def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a = Forward(*arguments)
    pre = narrow(a.x, a.down_weight, a.down_bias, a.down_index)  # [B, S, slots, r]
    h = _mix(a).forward(pre, a.activation, a.up_bias is not None)
    out = widen(h, _up_bank(a.up_weight, a.up_bias), a.up_index)
    if a.add_input:
        out = out.add_(a.x)
    elif a.residual is not None:
        out = out.add_(a.residual)
    return out.contiguous(), pre.flatten(2).contiguous()


def backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    a = Backward(*arguments)
    x = a.x
    dx, ddown_weight, ddown_bias, dup_weight, dup_bias = (x.new_empty(0) for _ in range(5))
    dgates = a.gates.new_empty(0)
    experts = a.down_weight.shape[0], a.up_weight.shape[0]
    mixed = _mix(a)
    slots = 1 if experts[0] == 1 else a.gates.shape[-1]
    pre = a.pre.view(*x.shape[:2], slots, a.down_weight.shape[1])
    if a.need_up:
        h = mixed.forward(pre, a.activation, constant=True)
        grads = bank_grad(h, a.grad_out, experts[1], a.up_index)  # [Mu, r + 1, Hout]
        dup_weight, dup_bias = grads[:, :-1].mT.contiguous(), grads[:, -1].contiguous()
    if a.need_input or a.need_down or a.need_gates:
        dh = narrow(a.grad_out, _up_bank(a.up_weight, a.up_bias), None, a.up_index)
        dpre, by_row = mixed.backward(dh, pre, a.activation, a.up_bias is not None)
        dgates = gates_grad(by_row, a.gates) if a.need_gates else dgates
        if a.need_down:
            ddown_weight = bank_grad(dpre, x, experts[0], a.down_index)
            ddown_bias = bank_grad(dpre, x.new_ones(*x.shape[:2], 1), experts[0], a.down_index).squeeze(2)
        if a.need_input:
            dx = widen(dpre, a.down_weight, a.down_index)
            dx = dx.add_(a.grad_out) if a.add_input else dx
    return dx.contiguous(), ddown_weight, ddown_bias, dup_weight, dup_bias, dgates


def _mix(a: Forward | Backward) -> Mix:
    experts = a.down_weight.shape[0], a.up_weight.shape[0]
    return Mix.of(a.x, experts, (a.down_index, a.up_index), a.gates, None, 1.0, a.mix)


def _up_bank(up_weight: torch.Tensor, up_bias: torch.Tensor | None) -> torch.Tensor:
    """[Mu, r, Hout], or [Mu, r + 1, Hout] with the bias last."""
    bank = up_weight.mT
    return bank if up_bias is None else torch.cat((bank, up_bias.unsqueeze(1)), 1)
