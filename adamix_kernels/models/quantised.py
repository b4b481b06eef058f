"""Bases whose weights are quantised: what can be merged into, and how gradients pass."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DYNAMIC = "torch.ao.nn.quantized.dynamic"


def plain_weight(layer: nn.Module) -> torch.Tensor | None:
    """layer.weight where it is an ordinary floating matrix; None for a quantised layer.

    Quantised weights are packed (a method, no tensor), integers or 8-bit floats, or a tensor subclass that
    carries scales. A DTensor is ordinary: a sharded floating matrix.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype not in FLOATS:
        return None
    return weight if type(weight) in (torch.Tensor, nn.Parameter) or _sharded(weight) else None


def dynamic_linear(layer: nn.Module) -> bool:
    """Whether `layer` is PyTorch's dynamically quantised linear layer."""
    module = sys.modules.get(_DYNAMIC)
    return module is not None and type(layer) is module.Linear


@contextlib.contextmanager
def known_to_train(model: nn.Module) -> Iterator[None]:
    """Tells transformers.Trainer's constructor that a model loaded quantised has adapters to train.

    It knows PEFT's and transformers' own only, by a mark on the model that must not stay: save_pretrained
    reads it too. A quantisation that cannot pass gradients stays refused.
    """
    mark = "_hf_peft_config_loaded"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not quantizer.is_trainable or getattr(model, mark, False):
        yield
        return
    had_mark = mark in vars(model)
    setattr(model, mark, True)
    try:
        yield
    finally:
        if had_mark:
            setattr(model, mark, False)
        else:
            delattr(model, mark)


def let_gradients_through(model: nn.Module) -> None:
    """dx = dy W for every dynamically quantised linear layer of `model`, W its dequantised weight.

    PyTorch's operator has no derivative: without this, backward passes by such a layer in silence and
    whatever lies below it learns from the residual connections alone.
    """
    for layer in model.modules():
        if dynamic_linear(layer) and _attach_backward not in layer._forward_hooks.values():
            layer.register_forward_hook(_attach_backward)


def _attach_backward(layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
    if torch.is_grad_enabled() and args[0].requires_grad:
        apply: Callable[..., torch.Tensor] = _StraightThrough.apply
        return apply(args[0], output.detach(), layer)
    return None


class _StraightThrough(torch.autograd.Function):
    """The rounding of x counts as the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, output: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        ctx.layer = layer
        ctx.mark_dirty(output)  # handed on as it is, and not as a view, so that what follows may write into it
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad @ ctx.layer.weight().dequantize().to(grad.dtype), None, None


def _sharded(weight: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)
