"""A LoRA layer and its linear router as one op, whose logits ride in the LoRA's tile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module

from ..ops.mixture_lora.op import by_kernel, columns_of
from ..ops.router.api import MOST_EXPERTS
from ..routing import LinearRouter, MixtureOutput, mixture_lora
from ._gated import mask_of

if TYPE_CHECKING:
    from .lora import RoutedLoRALinear


def rides(layer: RoutedLoRALinear) -> bool:
    """Whether the layer's gates are a linear router's that weigh outputs, as mixture_lora makes them."""
    return type(layer.gate) is LinearRouter and layer.gate.num_experts <= MOST_EXPERTS and layer.mix == "outputs"


def mixed(
    layer: RoutedLoRALinear,
    rows: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    **options: Any,
) -> torch.Tensor | None:
    """The layer's output, if kernels make router and LoRA one op, else None. options: those that
    mixture_lora and routed_lora share."""
    gate = layer.gate
    if not isinstance(gate, LinearRouter) or not rides(layer) or _watched(gate):
        return None
    if not by_kernel(layer.backend, rows.device, gate.computes_in(rows), columns_of(lora_a, lora_b)):
        return None

    def call(weight: torch.Tensor, top_k: int | None) -> MixtureOutput:
        return mixture_lora(rows, lora_a, lora_b, weight, top_k=top_k, **options)

    return gate.within(call, rows, mask_of(layer, rows)).out


def _watched(gate: nn.Module) -> bool:
    """Whether somebody is told of the router's calls, or has put a call of his own in its place."""
    hooks = gate._forward_hooks, gate._forward_pre_hooks, gate._backward_hooks, gate._backward_pre_hooks
    everywhere = (
        module._global_forward_hooks, module._global_forward_pre_hooks, module._global_backward_hooks,
        module._global_backward_pre_hooks,
    )  # fmt: skip
    return bool({"forward", "gates"} & gate.__dict__.keys()) or any(hooks) or any(everywhere)
