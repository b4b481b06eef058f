"""Reference backend of merging: explicit forward and backward in plain PyTorch.

What a backend module holds; arguments are checked and on one device:
    unsupported(device_type, dtype) -> why it cannot serve them, or None (not here: the reference serves all).
    experts_forward(bank, scores) -> merged; experts_backward(grad_out, bank, scores, need_bank, need_scores)
        -> (d bank, d scores), empty where not needed
    banks_forward(banks, scores, results) -> [merged], one launch; banks of one dtype and device. results: the same
        object for the same shapes and dtypes, or None; a backend may put its results there, and remember plans
    lora_forward(weight, lora_a, lora_b, scaling, groups, offsets, fan_in_fan_out) -> merged weight
    lora_backward(grad_out, lora_a, lora_b, need_a, need_b, scaling, groups, offsets, fan_in_fan_out)
        -> (d lora_a, d lora_b); `_wide.lora_backward` serves every device
"""

from __future__ import annotations

import math

import torch

from ._results import Results
from ._wide import lora_backward, wide_dtype

# Numbers of an expert whose products with the gradient live at once.
_AT_ONCE = 2**16

__all__ = ["banks_forward", "experts_backward", "experts_forward", "lora_backward", "lora_forward"]


def experts_forward(bank: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
    wide = wide_dtype(bank, scores)
    if scores is None:
        return bank.mean(0, dtype=wide).to(bank.dtype).contiguous()
    share = torch.softmax(scores.to(wide), 0)
    merged = (bank[0].to(wide) * share[0]).contiguous()
    for expert, part in zip(bank[1:], share[1:], strict=True):
        merged.addcmul_(expert.to(wide), part)
    return merged.to(bank.dtype)


def experts_backward(
    grad_out: torch.Tensor, bank: torch.Tensor, scores: torch.Tensor | None, need_bank: bool, need_scores: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = wide_dtype(bank, scores)
    grad = grad_out.to(wide)
    dbank, dscores = bank.new_empty(0), bank.new_empty(0)
    share = None if scores is None else torch.softmax(scores.to(wide), 0)
    if need_bank:
        dbank = torch.empty_like(bank, memory_format=torch.contiguous_format)
        if share is None:
            dbank.copy_(grad / bank.shape[0])
        else:
            torch.mul(grad, share.view(-1, *[1] * grad.dim()), out=dbank)
    if need_scores and scores is not None and share is not None:
        dots = _dots(bank, grad, wide)
        dscores = (share * (dots - (share * dots).sum())).to(scores.dtype)
    return dbank, dscores


def banks_forward(
    banks: list[torch.Tensor], scores: list[torch.Tensor | None], results: Results | None = None
) -> list[torch.Tensor]:
    return [experts_forward(bank, score) for bank, score in zip(banks, scores, strict=True)]


def lora_forward(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    groups: int,
    offsets: list[int],
    fan_in_fan_out: bool,
) -> torch.Tensor:
    wide = wide_dtype(weight, lora_a)
    out = weight.to(wide, copy=True, memory_format=torch.contiguous_format)
    rows = out.t() if fan_in_fan_out else out  # [N, K]
    per_group = lora_b.shape[1] // groups
    factors = zip(lora_a.mean(0, dtype=wide).chunk(groups), lora_b.mean(0, dtype=wide).chunk(groups), offsets)
    for a_g, b_g, offset in factors:
        rows.narrow(0, offset, per_group).add_(torch.mm(b_g, a_g), alpha=scaling)
    return out.to(weight.dtype)


def _dots(bank: torch.Tensor, grad: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """sum over d of bank[m, d] grad[d]: [M], a part at a time, so that the products stay in the cache."""
    if grad.dim() == 0:
        return bank.to(wide) * grad
    rows = max(1, _AT_ONCE // max(1, math.prod(grad.shape[1:])))
    parts = zip(bank.split(rows, 1), grad.split(rows), strict=True)
    return torch.stack([(b.to(wide) * g).flatten(1).sum(1) for b, g in parts]).sum(0)
