"""Batched products with a bank of weights, one expert per sample or per token, in plain PyTorch.

Shared by the reference backends of routed_adapter and routed_lora. A bank is [M, R, K]; x is [B, S, K]; an index is
None (bank of one), [B] or [B, S]. On a CPU each expert gets the tokens routed to it; elsewhere no tensor value
reaches Python (a CUDA graph can hold it): every expert gets all tokens, and what is not its own counts as 0.
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
    if reads_routing(index):
        flat = x.flatten(0, 1)
        rows = x.new_empty(flat.shape[0], bank.shape[1])
        for m, mine in enumerate(_tokens_of_each(index, bank.shape[0])):
            rows.index_copy_(0, mine, F.linear(flat.index_select(0, mine), bank[m], None if bias is None else bias[m]))
        return rows.view(*x.shape[:2], bank.shape[1])
    out = F.linear(x, bank[0], None if bias is None else bias[0])
    for m in range(1, bank.shape[0]):
        y = F.linear(x, bank[m], None if bias is None else bias[m])
        out = torch.where(index.eq(m).unsqueeze(-1), y, out)
    return out


def adds_itself(bank: torch.Tensor, index: torch.Tensor | None) -> bool:
    """Whether add_product makes no second [B, S, N]."""
    return bank.shape[0] == 1 or (index is not None and index.dim() == 1)


def add_product(out: torch.Tensor, t: torch.Tensor, bank: torch.Tensor, index: torch.Tensor | None, s: float) -> None:
    """out += s t W[i]^T, over out [B, S, N]: where a BLAS adds the product itself, no second [B, S, N] is made."""
    if bank.shape[0] == 1 and out.is_contiguous():
        out.flatten(0, 1).addmm_(t.flatten(0, 1), bank[0].t(), alpha=s)
    elif bank.shape[0] > 1 and index is not None and index.dim() == 1:
        out.baddbmm_(t, bank.index_select(0, index).transpose(1, 2), alpha=s)
    else:
        out.add_(project(t, bank, None, index), alpha=s)


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
        return sum_by_expert(torch.bmm(g.transpose(1, 2), x), num_experts, index)
    flat, flat_g = x.flatten(0, 1), g.flatten(0, 1)
    if reads_routing(index):
        each = _tokens_of_each(index, num_experts)
        return torch.stack([torch.mm(flat_g.index_select(0, t).t(), flat.index_select(0, t)) for t in each])
    rows = []
    for m in range(num_experts):
        mine = index.eq(m).reshape(-1, 1)
        grad = torch.mm(torch.where(mine, flat_g, 0).t(), flat)
        rows.append(torch.where(mine.any(), grad, 0))
    return torch.stack(rows)


def bias_grad(g: torch.Tensor, num_experts: int, index: torch.Tensor | None) -> torch.Tensor:
    """db[m] = sum of g_t over the tokens t routed to m: [M, R]."""
    if num_experts == 1:
        return at_least_float32(g).sum((0, 1)).to(g.dtype).unsqueeze(0)
    assert index is not None  # api.py: only a bank of one has none
    if index.dim() == 1:
        return sum_by_expert(at_least_float32(g).sum(1), num_experts, index).to(g.dtype)
    if reads_routing(index):
        flat = g.flatten(0, 1)
        sums = [at_least_float32(flat.index_select(0, mine)).sum(0) for mine in _tokens_of_each(index, num_experts)]
    else:
        sums = [torch.where(index.eq(m).unsqueeze(-1), at_least_float32(g), 0).sum((0, 1)) for m in range(num_experts)]
    return torch.stack(sums).to(g.dtype)


def reads_routing(index: torch.Tensor) -> bool:
    """Whether shapes may depend on the routing: where its values are at hand."""
    return index.device.type == "cpu"


def _tokens_of_each(index: torch.Tensor, num_experts: int) -> list[torch.Tensor]:
    """The numbers of the tokens routed to each expert, ascending."""
    return [index.flatten().eq(m).nonzero().squeeze(1) for m in range(num_experts)]


def sum_by_expert(per_sample: torch.Tensor, num_experts: int, index: torch.Tensor) -> torch.Tensor:
    """Sums [B, ...] into [M, ...] by expert, in sample order, accumulating at least in float32.

    On the CPU index_add_ is one sequential pass; elsewhere it would use atomics, so each expert
    sums its own samples with the others replaced by zero.
    """
    wide = at_least_float32(per_sample)
    if wide.device.type == "cpu":
        out = wide.new_zeros((num_experts, *wide.shape[1:]))
        return out.index_add_(0, index, wide).to(per_sample.dtype)
    column = index.view(-1, *[1] * (wide.dim() - 1))
    return torch.stack([torch.where(column == m, wide, 0).sum(0) for m in range(num_experts)]).to(per_sample.dtype)


def at_least_float32(t: torch.Tensor) -> torch.Tensor:
    """t in the dtype that sums are made in."""
    return t if t.dtype == torch.float64 else t.float()
