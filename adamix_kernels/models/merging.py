"""merge() and unmerge(): M experts into one, and back to the same bits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..modules import AdaptedLayer, RoutedLoRALinear
from ..modules.adapter import merge_adapters
from ..modules.lora_merging import merge_layers
from ..ops._checks import check_flag
from .factors import Factors
from .gating import check_mergeable, is_learned, spread
from .quantised import plain_weight
from .state import adamix_state, check_no_pack, replace_module
from .tying import shared_parameters

logger = logging.getLogger(__name__)


@torch.no_grad()
def merge(model: nn.Module, keep: bool = True, *, gates: str | None = None) -> nn.Module:
    """Averages the experts of every layer, each side by itself, and returns `model`.

    W = sum_m softmax(score)_m W_m. An adapter becomes a plain adapter (one expert); a LoRA layer gives way
    to its base layer with the update added to the weight (float32 accumulation, one rounding). The experts
    and the base weights are kept aside, so that unmerge restores every bit.

    A LoRA layer whose base is quantised becomes a plain LoRA (one expert) on the untouched base: the model
    computes what it computed in evaluation. Adding the update to quantised weights would round it to their
    steps, which are often larger than the update itself. So does one whose weight stands elsewhere in the model, too
    (an lm_head tied to the input embedding), which the update must not change.

    Args:
        keep: False drops what unmerge needs, the experts and a copy of every merged weight, and so frees their memory.
            The merged factors of a LoRA (r (K + N) values a layer) stay in either case: export_peft and save_adamix
            use them.
        gates: with routing="learned" "mean": each expert weighs what it did on the mean over the last training batches
            (sum_e g_e s B_e A_e, exactly: of rank M * r; M * r wide adapters). What that loses is logged: the share of
            the gates, 1 - |E g|^2 / E|g|^2, that their mean does not say, and kept as model.adamix.gate_spread by
            layer. Score the model before and after.

    Raises:
        TypeError: keep is no bool.
        ValueError: `model` is not adapted, is merged already, or is a pack; its gates are learned and `gates` is None,
            for no single expert computes what they do; they saw no training batch; keep is False for a name that
            a PackTrainer trains on; nothing is changed then.

    Source: AdaMix section 3.3 (merging weights); `expert_soup` of the reference project.

    Example:
        >>> adapt(model).eval()  # doctest: +ELLIPSIS
        Bert...
        >>> before = model(**batch).logits  # evaluation: all experts, averaged
        >>> torch.allclose(merge(model)(**batch).logits, before, atol=1e-6)
        True
    """
    check_flag("keep", keep)
    check_no_pack(model, "merge")
    state = adamix_state(model)
    if state.merged:
        raise ValueError("model: got a merged model, expected an unmerged one; call unmerge() first")
    if state.held and not keep:
        raise ValueError(f"keep: got False for {state.held}, which trains its experts on, expected True")
    check_mergeable(model, state, gates)
    state.gate_spread = spread(model) if gates else {}
    layers = {path: model.get_submodule(path) for path in state.paths}
    if state.config.method == "adapter":
        adapted = {path: cast("AdaptedLayer", layer) for path, layer in layers.items()}
        adapters = merge_adapters([layer.adapter for layer in adapted.values()])
        merged = dict(zip(layers, adapters, strict=True))
        for path, layer in adapted.items():
            if keep:
                state.stash[path] = layer.adapter
            layer.adapter = merged[path]
    else:
        loras = {path: cast("RoutedLoRALinear", layer) for path, layer in layers.items()}
        shared = shared_parameters(model)
        plain = {path: lora if lora.gate is None else plain_lora(lora) for path, lora in loras.items()}
        merged_factors, made = merge_layers(list(plain.values()), [mergeable(lora, shared) for lora in loras.values()])
        factors = dict(zip(loras, merged_factors, strict=True))
        weights = {path: weight for path, weight in zip(loras, made, strict=True) if weight is not None}
        for path, lora in loras.items():
            in_weight = path in weights
            if keep:
                state.stash[path] = (lora, lora.weight.detach().clone() if in_weight else None)
            if in_weight:
                state.factors[path] = Factors.of(plain[path], factors[path])
                replace_module(model, path, lora.base)
            else:
                replace_module(model, path, plain_lora(plain[path], factors[path]))
        if weights:
            torch._foreach_copy_([loras[path].weight for path in weights], list(weights.values()))
    state.merged, state.lost = True, "" if keep else "merge(model, keep=False) dropped them"
    if state.gate_spread:
        worst = max(state.gate_spread, key=state.gate_spread.__getitem__)
        mean = sum(state.gate_spread.values()) / len(state.gate_spread)
        logger.warning(
            "merge: the mean gates stand for the learned ones; they do not say %.1f%% of them on the mean over the "
            "layers, %.1f%% at %s. Score the model before and after.",
            100 * mean,
            100 * state.gate_spread[worst],
            worst,
        )
    return model


def mergeable(layer: RoutedLoRALinear, shared: Mapping[int, object]) -> bool:
    """Whether the update can go into the base's weight without requantising it, and without changing another layer.

    shared: shared_parameters() of the model.
    """
    weight = plain_weight(layer.base)
    return weight is not None and id(weight) not in shared


def plain_lora(layer: RoutedLoRALinear, factors: tuple[torch.Tensor, torch.Tensor] | None = None) -> RoutedLoRALinear:
    """A LoRA of one expert on the same base. factors: what layer.merged_factors() gives, if at hand."""
    lora_a, lora_b = layer.merged_factors() if factors is None else factors
    rank = lora_b.shape[1]
    same = rank == layer.r
    plain = RoutedLoRALinear(
        layer.base,
        layer.in_features,
        layer.out_features,
        rank,
        layer.alpha if same else layer.scaling * rank,
        1,
        None,
        layer.dropout,
        layer.groups,
        layer.output_offsets,
        layer.fan_in_fan_out,
        group_features=lora_b.shape[0] // layer.groups,
        use_rslora=layer.use_rslora and same,
        router=layer.router,
        backend=layer.backend,
        dtype=lora_a.dtype,
        device=lora_a.device,
    )
    with torch.no_grad():
        plain.lora_a[0].copy_(lora_a)
        plain.lora_b[0].copy_(lora_b)
    plain.place = layer.place
    for name, parameter in plain.named_parameters(recurse=False):
        parameter.requires_grad_(getattr(layer, name).requires_grad)
    return plain.train(layer.training)


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Puts back the experts and the base weights that merge() kept, bit for bit, and returns `model`.

    Raises ValueError: `model` is not merged, or holds no experts: it was loaded merged, or merged with keep=False.

    Example:
        >>> unmerge(merge(adapt(model))).adamix.merged
        False
    """
    state = adamix_state(model)
    if not state.merged:
        raise ValueError("model: got an unmerged model, expected one that merge() was called on")
    check_experts(model)
    for path in state.paths:
        here: Any = model.get_submodule(path)
        if state.config.method == "adapter":
            adapter = state.stash.pop(path).to(here.adapter.down_weight.device)
            here.adapter = adapter.train(here.training)
            continue
        layer, weight = state.stash.pop(path)
        if weight is not None:
            here.weight.copy_(weight)
        device = here.lora_a.device if weight is None else here.weight.device
        replace_module(model, path, layer.to(device).train(model.training))
    state.merged, state.gate_spread = False, {}
    state.factors.clear()
    return model


def check_experts(model: nn.Module, asked: str = "unmerge") -> None:
    """Raises ValueError for a merged model that cannot go back, and says why. asked: what needs the experts."""
    state = adamix_state(model)
    missing = [path for path in state.paths if path not in state.stash]
    if state.merged and missing:
        raise ValueError(
            f"model: got a merged model without experts for {missing[0]!r} ({state.lost}), expected one that "
            f"merge(model) was called on, which {asked} can undo; load_adamix gives one from an unmerged checkpoint"
        )


def learn_merging(model: nn.Module, enable: bool = True) -> nn.Module:
    """Trains the merge scores instead of the experts (or, with enable=False, the experts again).

    While a layer's scores require grad, its training forward uses the merged experts, so the loss reaches
    the scores through softmax(score). Returns `model`.

    Raises ValueError: `model` is not adapted, is merged, is a pack, or has learned gates, which weigh the experts.

    Example:
        >>> learn_merging(adapt(model))  # doctest: +ELLIPSIS
        Bert...
    """
    check_no_pack(model, "learn the merging of")
    state = adamix_state(model)
    if state.merged:
        raise ValueError("model: got a merged model, expected an unmerged one; call unmerge() first")
    if is_learned(model):
        raise ValueError("model: got one with learned gates, expected drawn experts: gates weigh them already")
    for path in state.paths:
        for name, parameter in model.get_submodule(path).named_parameters():
            if not name.startswith("base."):
                parameter.requires_grad_(name.endswith("_score") == enable)
    return model
