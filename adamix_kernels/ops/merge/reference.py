"""Reference backend of merging: explicit forward and backward in plain PyTorch."""

from __future__ import annotations

import torch


def experts_forward(bank, scores):
    wide = _wide(bank, scores)
    if scores is None:
        return bank.mean(0, dtype=wide).to(bank.dtype).contiguous()
    share = torch.softmax(scores.to(wide), 0)
    return (bank.to(wide) * _column(share, bank)).sum(0).to(bank.dtype).contiguous()


def experts_backward(grad_out, bank, scores, need_bank, need_scores):
    wide = _wide(bank, scores)
    grad = grad_out.to(wide).unsqueeze(0)
    num_experts = bank.shape[0]
    dbank, dscores = bank.new_empty(0), bank.new_empty(0)
    share = None if scores is None else torch.softmax(scores.to(wide), 0)
    if need_bank:
        each = grad / num_experts if share is None else grad * _column(share, bank)
        dbank = each.to(bank.dtype).expand(bank.shape).clone(memory_format=torch.contiguous_format)
    if need_scores:
        dots = (bank.to(wide) * grad).flatten(1).sum(1) if bank.dim() > 1 else bank.to(wide) * grad
        dscores = (share * (dots - (share * dots).sum())).to(scores.dtype)
    return dbank, dscores


def lora_forward(weight, lora_a, lora_b, scaling, groups, offsets, fan_in_fan_out):
    wide = _wide(weight, lora_a)
    out = weight.to(wide, copy=True, memory_format=torch.contiguous_format)
    rows = out.t() if fan_in_fan_out else out  # [N, K]
    per_group = lora_b.shape[1] // groups
    factors = zip(lora_a.mean(0, dtype=wide).chunk(groups), lora_b.mean(0, dtype=wide).chunk(groups), offsets)
    with torch._C._DisableAutocast():
        for a_g, b_g, offset in factors:
            rows.narrow(0, offset, per_group).add_(torch.mm(b_g, a_g), alpha=scaling)
    return out.to(weight.dtype)


def lora_backward(grad_out, lora_a, lora_b, need_a, need_b, scaling, groups, offsets, fan_in_fan_out):
    wide = _wide(grad_out, lora_a)
    grad = (grad_out.t() if fan_in_fan_out else grad_out).to(wide)
    per_group = lora_b.shape[1] // groups
    grads = [grad.narrow(0, offset, per_group) for offset in offsets]  # each [Ng, K]
    da, db = lora_a.new_empty(0), lora_b.new_empty(0)
    with torch._C._DisableAutocast():
        if need_a:
            factors = lora_b.mean(0, dtype=wide).chunk(groups)
            da = torch.cat([torch.mm(b_g.t(), g) for g, b_g in zip(grads, factors, strict=True)])
            da = _spread(da.mul_(scaling), lora_a)
        if need_b:
            factors = lora_a.mean(0, dtype=wide).chunk(groups)
            db = torch.cat([torch.mm(g, a_g.t()) for g, a_g in zip(grads, factors, strict=True)])
            db = _spread(db.mul_(scaling), lora_b)
    return da, db


def _wide(*tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype to accumulate in: float64 when an argument is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _column(share: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """[M] -> [M, 1, ..., 1], to broadcast over bank."""
    return share.view(-1, *[1] * (bank.dim() - 1))


def _spread(grad: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """The gradient of a bank from that of its uniform mean: every expert gets an M-th of it."""
    return (grad / bank.shape[0]).to(bank.dtype).expand(bank.shape).clone(memory_format=torch.contiguous_format)
