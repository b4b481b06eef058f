"""The moment at which "auto" is settled for a model: the end of adapt() and load(), and a trainer's start."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..modules import RoutedAdapter, RoutedLoRALinear
from ..routing import LinearRouter
from ..verifying import verify_for

Need = tuple[str, torch.dtype, int]


def settle_backends(model: nn.Module, dtypes: Iterable[torch.dtype] = ()) -> None:
    """Verifies the kernels that a model on a GPU needs, once on each machine, so that "auto" may take them.

    dtypes: that it will compute in under autocast. On a CPU, or where every layer names its backend: nothing.
    """
    for device, needs in needed(model, dtypes).items():
        verify_for(device, needs)


def needed(model: nn.Module, dtypes: Iterable[torch.dtype] = ()) -> dict[torch.device, list[Need]]:
    """(op, dtype, size) of the calls that its layers and its loss make with "auto", by device."""
    made: dict[torch.device, dict[Need, None]] = {}
    more = list(dtypes)
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            more.append(torch.get_autocast_dtype(device))
    classes = _classes(model)
    for layer in model.modules():
        if getattr(layer, "backend", None) != "auto":
            continue
        if isinstance(layer, RoutedAdapter):
            name, bank, other = "adapter", layer.down_weight, layer.up_weight
        elif isinstance(layer, RoutedLoRALinear):
            name, bank, other = "lora", layer.lora_a, layer.lora_b
        else:
            continue
        mine = made.setdefault(bank.device, {})
        mine["merge", bank.dtype, 0] = None
        for dtype in (bank.dtype, *more):
            mine[f"routed_{name}", dtype, bank.shape[0] * bank.shape[1]] = None
            if layer.gate is not None:
                mine[f"gated_{name}", dtype, max(bank.shape[0], other.shape[0]) * bank.shape[1]] = None
            if isinstance(layer.gate, LinearRouter):
                mine["router", dtype, 0] = None
                if isinstance(layer, RoutedLoRALinear) and layer.rides:
                    mine["mixture_lora", dtype, max(bank.shape[0], other.shape[0]) * bank.shape[1]] = None
            for size in classes:
                mine["consistency", dtype, size] = None
    return {device: list(needs) for device, needs in made.items()}


def _classes(model: nn.Module) -> list[int]:
    """The numbers of classes that its loss may see: of its task's labels, or of its vocabulary."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return [weight.shape[0]]
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    return [labels] if isinstance(labels, int) else []
