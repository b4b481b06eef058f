"""merge() and unmerge(): M experts into one, and back to the same bits."""

from __future__ import annotations

import torch
from torch import nn

from ..modules.adapter import merge_adapters
from ..modules.lora import merge_factors
from .state import adamix_state, replace_module


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Averages the experts of every layer, each side by itself, and returns `model`.

    W = sum_m softmax(score)_m W_m. An adapter becomes a plain adapter (one expert); a LoRA layer gives way
    to its base layer with the update added to the weight (float32 accumulation, one rounding). The experts
    and the base weights are kept aside, so that unmerge restores every bit.

    Raises:
        ValueError: `model` is not adapted, or is merged already, or a LoRA base has no floating weight;
            nothing is changed then.

    Source: AdaMix section 3.3 (merging weights); `expert_soup` of the reference project.
    """
    state = adamix_state(model)
    if state.merged:
        raise ValueError("model: got a merged model, expected an unmerged one; call unmerge() first")
    layers = {path: model.get_submodule(path) for path in state.paths}
    if state.config.method == "adapter":
        adapters = merge_adapters([layer.adapter for layer in layers.values()])
        merged = dict(zip(layers, adapters, strict=True))
        for path, layer in layers.items():
            state.stash[path] = layer.adapter
            layer.adapter = merged[path]
    else:
        factors = merge_factors(list(layers.values()))
        merged = {path: layer.merged_weight(pair) for (path, layer), pair in zip(layers.items(), factors, strict=True)}
        for path, layer in layers.items():
            state.stash[path] = (layer, layer.base.weight.detach().clone())
            layer.base.weight.copy_(merged[path])
            replace_module(model, path, layer.base)
    state.merged = True
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Puts back the experts and the base weights that merge() kept, bit for bit, and returns `model`.

    Raises ValueError: `model` is not merged, or was loaded merged and so holds no experts.
    """
    state = adamix_state(model)
    if not state.merged:
        raise ValueError("model: got an unmerged model, expected one that merge() was called on")
    missing = [path for path in state.paths if path not in state.stash]
    if missing:
        raise ValueError(
            f"model: got a merged checkpoint without experts for {missing[0]!r}, expected merge() on this model"
        )
    for path in state.paths:
        here = model.get_submodule(path)
        if state.config.method == "adapter":
            adapter = state.stash.pop(path).to(here.adapter.down_weight.device)
            here.adapter = adapter.train(here.training)
        else:
            layer, weight = state.stash.pop(path)
            here.weight.copy_(weight)
            replace_module(model, path, layer.to(here.weight.device).train(model.training))
    state.merged = False
    return model


def learn_merging(model: nn.Module, enable: bool = True) -> nn.Module:
    """Trains the merge scores instead of the experts (or, with enable=False, the experts again).

    While a layer's scores require grad, its training forward uses the merged experts, so the loss reaches
    the scores through softmax(score). Returns `model`.

    Raises ValueError: `model` is not adapted, or is merged.
    """
    state = adamix_state(model)
    if state.merged:
        raise ValueError("model: got a merged model, expected an unmerged one; call unmerge() first")
    for path in state.paths:
        for name, parameter in model.get_submodule(path).named_parameters():
            if not name.startswith("base."):
                parameter.requires_grad_(name.endswith("_score") == enable)
    return model
