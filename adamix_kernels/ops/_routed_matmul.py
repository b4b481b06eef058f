"""Batched products with a bank of weights, one expert per sample or per token, in plain PyTorch.

Shared by the reference backends of routed_adapter and routed_lora. No tensor value reaches Python,
so shapes never depend on the routing. A bank is [M, R, K]; x is [B, S, K]; an index is None (bank of
one), [B] or [B, S].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def project(x: torch.Tensor, bank: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor | None) -> torch.Tensor:
    """y = x W[i]^T + b[i]: [B, S, K] -> [B, S, R]."""
    if bank.shape[0] == 1:
        return F.linear(x, bank[0], None if bias is None else bias[0])
    assert index is not None  # api.py: only a bank of one has none
    if index.dim() == 1:
        weight = bank.index_select(0, index).transpose(1, 2)  # [B, K, R]
        if bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(bias.index_select(0, index).unsqueeze(1), x, weight)
    out = F.linear(x, bank[0], None if bias is None else bias[0])
    for m in range(1, bank.shape[0]):
        y = F.linear(x, bank[m], None if bias is None else bias[m])
        out = torch.where(index.eq(m).unsqueeze(-1), y, out)
    return out


def project_back(g: torch.Tensor, bank: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """dx = g W[i]: [B, S, R] -> [B, S, K]."""
    if bank.shape[0] == 1:
        return torch.matmul(g, bank[0])
    assert index is not None  # api.py: only a bank of one has none
    if index.dim() == 1:
        return torch.bmm(g, bank.index_select(0, index))
    return project(g, bank.transpose(1, 2), None, index)


def weight_grad(g: torch.Tensor, x: torch.Tensor, num_experts: int, index: torch.Tensor | None) -> torch.Tensor:
    """dW[m] = sum of g_t x_t^T over the tokens t routed to m: [M, R, K], exactly zero for an unused expert."""
    if num_experts == 1:
        return torch.mm(g.flatten(0, 1).t(), x.flatten(0, 1)).unsqueeze(0)
    assert index is not None  # api.py: only a bank of one has none
    if index.dim() == 1:
        return _sum_by_expert(torch.bmm(g.transpose(1, 2), x), num_experts, index)
    flat = x.flatten(0, 1)
    rows = []
    for m in range(num_experts):
        mine = index.eq(m).reshape(-1, 1)
        grad = torch.mm(torch.where(mine, g.flatten(0, 1), 0).t(), flat)
        rows.append(torch.where(mine.any(), grad, 0))
    return torch.stack(rows)


def bias_grad(g: torch.Tensor, num_experts: int, index: torch.Tensor | None) -> torch.Tensor:
    """db[m] = sum of g_t over the tokens t routed to m: [M, R]."""
    if num_experts == 1:
        return _wide(g).sum((0, 1)).to(g.dtype).unsqueeze(0)
    assert index is not None  # api.py: only a bank of one has none
    if index.dim() == 1:
        return _sum_by_expert(_wide(g).sum(1), num_experts, index).to(g.dtype)
    return torch.stack(
        [torch.where(index.eq(m).unsqueeze(-1), _wide(g), 0).sum((0, 1)).to(g.dtype) for m in range(num_experts)]
    )


def _sum_by_expert(per_sample: torch.Tensor, num_experts: int, index: torch.Tensor) -> torch.Tensor:
    """Sums [B, ...] into [M, ...] by expert, in sample order, accumulating at least in float32.

    On the CPU index_add_ is one sequential pass; elsewhere it would use atomics, so each expert
    sums its own samples with the others replaced by zero.
    """
    wide = _wide(per_sample)
    if wide.device.type == "cpu":
        out = wide.new_zeros((num_experts, *wide.shape[1:]))
        return out.index_add_(0, index, wide).to(per_sample.dtype)
    column = index.view(-1, *[1] * (wide.dim() - 1))
    return torch.stack([torch.where(column == m, wide, 0).sum(0) for m in range(num_experts)]).to(per_sample.dtype)


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()
