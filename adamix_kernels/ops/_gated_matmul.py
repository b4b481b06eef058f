"""Batched products with a bank of weights, several experts a sample or token, in plain PyTorch.

Shared by the reference backends of gated_lora and gated_adapter. A bank is [M, R, C], R narrow and C wide; x is
[B, S, C]; narrow values are [B, S, slots, R]. A bank of one has one slot; else an index of None means that slot e is
expert e, and [B, K] or [B, S, K] which experts the K slots are. While all experts' columns fit into WIDE, all of them
are one product. What an expert holds, or a row that does not name it, never meets that expert's result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ._routed_matmul import at_least_float32, reads_routing, sum_by_expert

# Columns of all experts that are one product, whichever of them a row has chosen.
WIDE = 256


def narrow(x: torch.Tensor, bank: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor | None) -> torch.Tensor:
    """y_k = x W_k^T + b_k: [B, S, C] -> [B, S, slots, R]."""
    experts, r, c = bank.shape
    batch, tokens, _ = x.shape
    if experts == 1 or index is None:
        return _all(x, bank, bias)
    slots = index.shape[-1]
    if index.dim() == 2:
        chosen = index.flatten()
        weight = bank.index_select(0, chosen).view(batch, slots * r, c).transpose(1, 2)
        if bias is None:
            return torch.bmm(x, weight).view(batch, tokens, slots, r)
        added = bias.index_select(0, chosen).view(batch, 1, slots * r)
        return torch.baddbmm(added, x, weight).view(batch, tokens, slots, r)
    if reads_routing(index):
        if experts * r <= WIDE:
            return _all(x, bank, bias).gather(2, _columns(index, r))
        flat, out = x.flatten(0, 1), x.new_empty(batch * tokens * slots, r)
        for m, rows, places in _slots_of_each(index, experts):
            out.index_copy_(0, places, F.linear(flat.index_select(0, rows), bank[m], None if bias is None else bias[m]))
        return out.view(batch, tokens, slots, r)
    out = x.new_zeros(batch, tokens, slots, r)
    for m in range(experts):
        y = F.linear(x, bank[m], None if bias is None else bias[m]).unsqueeze(2)
        out = torch.where(index.eq(m).unsqueeze(-1), y, out)
    return out


def widen(h: torch.Tensor, bank: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """y = sum_k h_k W_k: [B, S, slots, R] -> [B, S, C], added up at least in float32."""
    experts, r, c = bank.shape
    batch, tokens, slots, _ = h.shape
    if experts == 1 or index is None:
        return torch.matmul(h.flatten(2), bank.reshape(experts * r, c))
    if index.dim() == 2:
        weight = bank.index_select(0, index.flatten()).view(batch, slots * r, c)
        return torch.bmm(h.reshape(batch, tokens, slots * r), weight)
    if reads_routing(index):
        if experts * r <= WIDE and bool(torch.isfinite(bank).all()):
            return torch.matmul(_spread(h, index, experts).flatten(2), bank.reshape(experts * r, c))
        flat = h.reshape(batch * tokens * slots, r)
        out = at_least_float32(h.new_empty(0)).new_zeros(batch * tokens, c)
        for m, rows, places in _slots_of_each(index, experts):
            out.index_add_(0, rows, at_least_float32(torch.mm(flat.index_select(0, places), bank[m])))
        return out.view(batch, tokens, c).to(h.dtype)
    out = at_least_float32(h.new_empty(0)).new_zeros(batch, tokens, c)
    for m in range(experts):
        mine = index.eq(m).unsqueeze(-1)
        y = torch.matmul(torch.where(mine, h, 0).sum(2), bank[m])
        out = torch.where(mine.any(2), out + y, out)
    return out.to(h.dtype)


def bank_grad(h: torch.Tensor, x: torch.Tensor, experts: int, index: torch.Tensor | None) -> torch.Tensor:
    """dW[m] = sum of h_k^T x over the rows and slots k that name m: [M, R, C], exactly zero for an unused expert."""
    batch, tokens, slots, r = h.shape
    c = x.shape[2]
    if experts == 1 or index is None:
        return torch.mm(h.reshape(batch * tokens, experts * r).t(), x.flatten(0, 1)).view(experts, r, c)
    if index.dim() == 2:
        each = torch.bmm(h.reshape(batch, tokens, slots * r).transpose(1, 2), x).view(batch * slots, r, c)
        return sum_by_expert(each, experts, index.flatten())
    flat = x.flatten(0, 1)
    if reads_routing(index):
        if experts * r <= WIDE:
            wide = torch.mm(_spread(h, index, experts).view(batch * tokens, experts * r).t(), flat)
            if bool(torch.isfinite(wide).all()):
                return wide.view(experts, r, c)
        values, out = h.reshape(batch * tokens * slots, r), x.new_zeros(experts, r, c)
        for m, rows, places in _slots_of_each(index, experts):
            torch.mm(values.index_select(0, places).t(), flat.index_select(0, rows), out=out[m])
        return out
    grads = []
    for m in range(experts):
        mine = index.eq(m)
        own = torch.where(mine.unsqueeze(-1), h, 0).sum(2).flatten(0, 1)
        grads.append(torch.where(mine.any(), torch.mm(own.t(), flat), 0))
    return torch.stack(grads)


def _all(x: torch.Tensor, bank: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Every expert's product, as one: [B, S, M, R]."""
    experts, r, c = bank.shape
    wide = F.linear(x, bank.reshape(experts * r, c), None if bias is None else bias.flatten())
    return wide.view(*x.shape[:2], experts, r)


def _columns(index: torch.Tensor, r: int) -> torch.Tensor:
    return index.long().unsqueeze(-1).expand(*index.shape, r)


def _spread(h: torch.Tensor, index: torch.Tensor, experts: int) -> torch.Tensor:
    """[B, S, slots, R] -> [B, S, M, R]: every slot's values at its expert, added where two slots name one."""
    batch, tokens, _, r = h.shape
    wide = at_least_float32(h)
    out = wide.new_zeros(batch, tokens, experts, r).scatter_add_(2, _columns(index, r), wide)
    return out.to(h.dtype)


def _slots_of_each(index: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, rows, places among rows * K slots) of every expert that a slot names, both ascending."""
    ids = index.flatten().long()
    order = torch.argsort(ids, stable=True)
    start = 0
    for m, count in enumerate(torch.bincount(ids, minlength=experts).tolist()):
        if count:
            places = order[start : start + count]
            yield m, torch.div(places, index.shape[-1], rounding_mode="floor"), places
            start += count
