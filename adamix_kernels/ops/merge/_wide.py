"""What the backends of merging share: the accumulation dtype and the gradients of LoRA factors."""

from __future__ import annotations

import torch


def wide_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype to accumulate in: float64 when an argument is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def lora_backward(
    grad_out: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    need_a: bool,
    need_b: bool,
    scaling: float,
    groups: int,
    offsets: list[int],
    fan_in_fan_out: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d lora_a, d lora_b): skinny matmuls, which PyTorch's library serves on every device."""
    wide = wide_dtype(grad_out, lora_a)
    grad = (grad_out.t() if fan_in_fan_out else grad_out).to(wide)
    per_group = lora_b.shape[1] // groups
    grads = [grad.narrow(0, offset, per_group) for offset in offsets]  # each [Ng, K]
    da, db = lora_a.new_empty(0), lora_b.new_empty(0)
    if need_a:
        factors = lora_b.mean(0, dtype=wide).chunk(groups)
        da = torch.cat([torch.mm(b_g.t(), g) for g, b_g in zip(grads, factors, strict=True)])
        da = _spread(da.mul_(scaling), lora_a)
    if need_b:
        factors = lora_a.mean(0, dtype=wide).chunk(groups)
        db = torch.cat([torch.mm(g, a_g.t()) for g, a_g in zip(grads, factors, strict=True)])
        db = _spread(db.mul_(scaling), lora_b)
    return da, db


def _spread(grad: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """The gradient of a bank from that of its uniform mean: every expert gets an M-th of it."""
    return (grad / bank.shape[0]).to(bank.dtype).expand(bank.shape).clone(memory_format=torch.contiguous_format)
