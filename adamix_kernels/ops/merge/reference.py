"""Reference backend of merging: explicit forward and backward in plain PyTorch.

What a backend module holds; arguments are checked and on one device:
    unsupported(device_type, dtype) -> why it cannot serve them, or None (not here: the reference serves all).
    experts_forward(bank, scores) -> merged; experts_backward(grad_out, bank, scores, need_bank, need_scores)
        -> (d bank, d scores), empty where not needed
    banks_forward(banks, scores, results) -> [merged], one launch; banks of one dtype and device. results: the same
        object for the same shapes, strides, dtypes and device, of scores too, or None; a backend may put its results
        there, and remember plans
    lora_forward(weight, lora_a, lora_b, scaling, groups, offsets, fan_in_fan_out) -> merged weight
    loras_forward(weights, lora_a, lora_b, scaling, groups, offsets, fan_in_fan_out) -> merged weights [layers, ...], of
        lists of tensors that are alike in shapes, dtypes and device; one launch
    lora_banks_forward(weights, lora_a, lora_b, a_scores, b_scores, scaling, groups, offsets, fan_in_fan_out)
        -> (loras_forward of banks_forward's means, those of A [layers, ...], of B); of alike scores too, or of empty
        lists: uniform means. What stands for the means of banks of one is not looked at. None where one launch cannot
        do all; a backend may lack it
    lora_backward(grad_out, lora_a, lora_b, need_a, need_b, scaling, groups, offsets, fan_in_fan_out)
        -> (d lora_a, d lora_b); `_wide.lora_backward` serves every device
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ._results import Results
from ._wide import lora_backward, wide_dtype
from .signatures import LoRA, LoRAs

# Numbers of an expert that are widened, or multiplied with the gradient, at once.
_AT_ONCE = 2**16
# Bytes: that of torch's own memory on a CPU.
_ALIGNMENT = 64

__all__ = ["banks_forward", "experts_backward", "experts_forward", "lora_backward", "lora_forward", "loras_forward"]


def experts_forward(bank: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
    wide = wide_dtype(bank, scores)
    if bank.device.type == "cpu":
        return _weighted(bank, _uniform(bank, wide) if scores is None else torch.softmax(scores.to(wide), 0))
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
    wide, experts = wide_dtype(bank, scores), bank.shape[0]
    dbank, dscores = bank.new_empty(0), bank.new_empty(0)
    if need_bank:
        dbank = torch.empty_like(bank, memory_format=torch.contiguous_format)
    if scores is None:
        if need_bank:
            dbank.copy_(grad_out.to(wide) / experts)
        return dbank, dscores
    share = torch.softmax(scores.to(wide), 0)
    dots = _backward_parts(_aligned(grad_out).view(-1), bank, share, dbank if need_bank else None, need_scores)
    if need_scores:
        dscores = (share * (dots - (share * dots).sum())).to(scores.dtype)
    return dbank, dscores


def banks_forward(
    banks: list[torch.Tensor], scores: list[torch.Tensor | None], results: Results | None = None
) -> list[torch.Tensor]:
    plan = _means_at_once(banks, results)
    if plan is None:
        return [experts_forward(bank, score) for bank, score in zip(banks, scores, strict=True)]
    merged = []
    for bank, score, (share, flat, shape) in zip(banks, scores, plan, strict=True):
        if score is not None or bank.data_ptr() % _ALIGNMENT or not bank.is_contiguous():
            merged.append(experts_forward(bank, score))
        elif flat is None:
            merged.append(torch.mv(bank.t(), share))
        else:
            merged.append(torch.mv(bank.view(flat).t(), share).view(shape))
    return merged


def lora_forward(*arguments: Any) -> torch.Tensor:
    a = LoRA(*arguments)
    wide = wide_dtype(a.weight, a.lora_a)
    out = a.weight.to(wide, copy=True, memory_format=torch.contiguous_format)
    rows = out.t() if a.fan_in_fan_out else out  # [N, K]
    per_group = a.lora_b.shape[1] // a.groups
    factors = zip(a.lora_a.mean(0, dtype=wide).chunk(a.groups), a.lora_b.mean(0, dtype=wide).chunk(a.groups), a.offsets)
    for a_g, b_g, offset in factors:
        rows.narrow(0, offset, per_group).add_(torch.mm(b_g, a_g), alpha=a.scaling)
    return out.to(a.weight.dtype)


def loras_forward(*arguments: Any) -> torch.Tensor:
    weights, lora_a, lora_b, *options = LoRAs(*arguments)
    out = weights[0].new_empty((len(weights), *weights[0].shape))
    for to, *layer in zip(out, weights, lora_a, lora_b, strict=True):
        to.copy_(lora_forward(*layer, *options))
    return out


_Mean = tuple[torch.Tensor, tuple[int, int] | None, torch.Size]


def _means_at_once(banks: list[torch.Tensor], results: Results | None) -> list[_Mean] | None:
    """For each bank (uniform shares, [M, elements] or None for a bank of two axes, the result's shape), kept with
    `results`; None where the mean is no product of the bank as it is. Of small banks the calls are what takes time."""
    if results is None or results.device.type != "cpu" or results.dtype != wide_dtype(*banks[:1]):
        return None
    plan: list[_Mean] | None = results.plans.get("means")
    if plan is None:
        shares = {bank.shape[0]: _uniform(bank, results.dtype) for bank in banks}
        plan = results.plans["means"] = [
            (
                shares[bank.shape[0]],
                None if bank.dim() == 2 else (bank.shape[0], math.prod(bank.shape[1:])),
                bank.shape[1:],
            )
            for bank in banks
        ]
    return plan


def _uniform(bank: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    return bank.new_full((bank.shape[0],), 1 / bank.shape[0], dtype=wide)


def _weighted(bank: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """sum over m of share[m] bank[m] on a CPU, in share's dtype and rounded once: a bank of another part by part."""
    flat = bank = _aligned(bank)
    rows = bank.dim() == 2
    if not rows:
        flat = bank.view(len(bank), math.prod(bank.shape[1:]))
    if bank.dtype == share.dtype:
        merged = torch.mv(flat.t(), share)
    else:
        merged = bank.new_empty(flat.shape[1])
        for out, part in zip(merged.split(_AT_ONCE), flat.split(_AT_ONCE, 1), strict=True):
            out.copy_(torch.mv(part.to(share.dtype).t(), share))
    return merged if rows else merged.view(bank.shape[1:])


def _backward_parts(
    grad: torch.Tensor, bank: torch.Tensor, share: torch.Tensor, dbank: torch.Tensor | None, need_dots: bool
) -> torch.Tensor:
    """dbank[m] = share[m] grad; returns sum over d of bank[m, d] grad[d]: part by part, each still in the cache."""
    experts, wide = bank.shape[0], share.dtype
    weights, dots = share.unsqueeze(1), []
    ours = _aligned(bank).view(experts, grad.numel()).split(_AT_ONCE, 1) if need_dots else ()
    theirs = dbank.view(experts, grad.numel()).split(_AT_ONCE, 1) if dbank is not None else ()
    for n, part in enumerate(grad.split(_AT_ONCE)):
        part = part.to(wide)
        if ours:
            dots.append(torch.mv(ours[n].to(wide), part))
        if theirs:
            torch.mul(part, weights, out=theirs[n])
    return torch.stack(dots).sum(0) if dots else share


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """`t`, contiguous: on a CPU, where a BLAS sums in another order at another address, where new memory would lie."""
    if t.is_contiguous() and (t.data_ptr() % _ALIGNMENT == 0 or t.device.type != "cpu"):
        return t
    return t.clone(memory_format=torch.contiguous_format)
