"""Derivatives of merging, in terms of its forward and backward ops."""

from __future__ import annotations

from typing import Any

import torch

from .._library import below_autograd, differentiate, gradients_of, once_differentiable
from .op import merge_experts_backward_op, merge_lora_backward_op
from .op import merge_experts_op as merge_experts_op
from .op import merge_lora_op as merge_lora_op
from .signatures import LoRA


class MergeExpertsFunction(torch.autograd.Function):
    """Saves the bank and the scores."""

    @staticmethod
    def forward(ctx: Any, bank: torch.Tensor, scores: torch.Tensor | None, backend: str) -> torch.Tensor:
        ctx.save_for_backward(bank, scores)
        ctx.backend = backend
        return below_autograd(merge_experts_op, bank, scores, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        grads = merge_experts_backward_op(grad_out, *ctx.saved_tensors, *wanted, ctx.backend)
        dbank, dscores = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return dbank, dscores, None


class MergeLoRAFunction(torch.autograd.Function):
    """Saves the factors; the weight's gradient is grad_out itself."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        _, lora_a, lora_b, *ctx.options = arguments
        ctx.save_for_backward(lora_a, lora_b)
        return below_autograd(merge_lora_op, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_weight, *wanted = ctx.needs_input_grad[:3]
        da = db = None
        if any(wanted):
            grads = merge_lora_backward_op(grad_out, *ctx.saved_tensors, *wanted, *ctx.options)
            da, db = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return gradients_of(LoRA, weight=grad_out if need_weight else None, lora_a=da, lora_b=db)


differentiate(merge_experts_op, MergeExpertsFunction)
differentiate(merge_lora_op, MergeLoRAFunction)
