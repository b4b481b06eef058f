"""load_official: the checkpoints of microsoft/AdaMix, for BERT, RoBERTa and GPT-2."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..models.config import AdaMixConfig
from ..models.header import listed
from ..models.inject import adapt, build_layers
from ..models.state import adamix_state
from ..models.targets import model_type
from ..modules import AdaptedLayer, RoutedLoRALinear
from ..routing import Router
from ._clip import clip_predictions
from ._official_format import OfficialFacts, Slot, adapter_slots, is_added, lora_slots, read_facts, read_official

logger = logging.getLogger(__name__)

_HEAD = "classifier"


def load_official(
    model: nn.Module, path: str | os.PathLike[str], *, head: bool = True, alpha: float = 32.0, backend: str = "auto"
) -> nn.Module:
    """Puts a checkpoint of the reference project into `model` and returns it.

    Two families are read: the flat `.bin` of BERT and RoBERTa (`...output.ExpertSoup.*` and the classifier),
    and GPT-2's `{"model_state_dict": ...}` in its LoRA form (`...attn.c_attn.experts_lora_*`) and its adapter
    form (`...mlp.ExpertSoup.*`). Base weights in the file are loaded too; a warning says when they differ from
    the model's. Only tensors are unpickled. A RoBERTa with one label (STS-B) whose head is loaded clips its predictions
    at 0 in evaluation, as released (see clip_predictions).

    Args:
        model: the bare Hugging Face model, which is adapted with what the file says (experts, sharing, sizes;
            erf GELU for BERT and RoBERTa, tanh GELU for GPT-2), or one adapted so already.
        path: the file.
        head: whether to load `classifier.*`; False keeps the model's own, as for a start from another task.
            A model without a classifier ignores it.
        alpha: numerator of the LoRA scaling, which the file does not hold; 32 in every released script.
        backend: for a bare model, as in adapt().

    Raises:
        ValueError: the file is none of these, or a key is missing, unexpected or of another shape; the
            message names the reference project's keys. Everything is checked before `model` changes.

    Source: `save_partial_model` and NLG/src/gpt2_ft.py of the reference project.

    Example:
        >>> load_official(model, "roberta_base_sst2.bin")  # doctest: +SKIP
    """
    values = read_official(path)
    facts = read_facts(values)
    if model_type(model) != facts.family:
        raise ValueError(f"model: got model_type {model_type(model)!r}, expected {facts.family!r} for this file")
    config = _config(facts, alpha)
    bare = getattr(model, "adamix", None) is None
    layers: Mapping[str, nn.Module]
    if bare:
        layers = build_layers(model, config, Router())
    else:
        _check_adapted(model, config)
        layers = {p: model.get_submodule(p) for p in adamix_state(model).paths}

    outer = "" if _has_base_prefix(model) else f"{model.base_model_prefix}."
    slots = _slots(layers, facts, outer)
    heads, rest = _base_slots(model, [k for k in values if not is_added(k)], outer, head)
    _check(values, slots, heads, rest)
    _warn_about_base(model, values, rest)

    if bare:
        adapt(model, config, backend=backend)
    _fill(model, values, {**slots, **heads, **rest})
    if facts.family == "roberta" and heads and cast("Any", model).config.num_labels == 1:
        clip_predictions(model)
    return model


def _config(facts: OfficialFacts, alpha: float) -> AdaMixConfig:
    config = AdaMixConfig(method=facts.method, num_experts=facts.num_experts, share=facts.share, alpha=alpha)
    if facts.family == "gpt2":
        config = replace(config, consistency_weight=100.0)
    return replace(config, r=facts.width) if facts.method == "lora" else replace(config, bottleneck=facts.width)


def _check_adapted(model: nn.Module, wanted: AdaMixConfig) -> None:
    state = adamix_state(model)
    if state.merged:
        raise ValueError("model: got a merged model, expected a bare or an unmerged one")
    sizes = ("r", "alpha", "qkv") if wanted.method == "lora" else ("bottleneck",)
    for name in ("method", "num_experts", "share", *sizes):
        got, expected = getattr(state.config, name), getattr(wanted, name)
        if got != expected:
            raise ValueError(f"{name}: got {got!r} in the adapted model, expected {expected!r} for this file")
    if wanted.method == "adapter":
        expected = "gelu_tanh" if model_type(model) == "gpt2" else "gelu"
        for path in state.paths:
            got = cast("AdaptedLayer", model.get_submodule(path)).adapter.activation
            if got != expected:
                raise ValueError(f"activation: got {got!r} in {path}, expected {expected!r} for this file")


def _has_base_prefix(model: nn.Module) -> bool:
    """Whether paths start with "bert." and so on, as in the file; a headless model lacks it."""
    return isinstance(getattr(model, str(model.base_model_prefix), None), nn.Module)


def _slots(layers: Mapping[str, nn.Module], facts: OfficialFacts, outer: str) -> dict[str, list[Slot]]:
    """key in the file -> where its value goes, for every value that AdaMix adds."""
    found = {}
    for path, layer in layers.items():
        if facts.method == "lora":
            here = lora_slots(f"{outer}{path}.", cast("RoutedLoRALinear", layer))
        else:
            here = adapter_slots(
                f"{outer}{path}".rpartition(".")[0] + ".ExpertSoup.", cast("AdaptedLayer", layer).adapter
            )
        found.update({k: [replace(s, name=f"{path}.{s.name}") for s in targets] for k, targets in here.items()})
    return found


def _base_slots(
    model: nn.Module, keys: list[str], outer: str, head: bool
) -> tuple[dict[str, list[Slot]], dict[str, list[Slot]]]:
    """(the head's keys, all of which are wanted; the base's keys that came), each with its place in `model`."""
    own = {name.replace(".base.", "."): (name, tuple(p.shape)) for name, p in model.state_dict().items()}
    heads = {
        key: [Slot(name, None, shape)] for key, (name, shape) in own.items() if head and key.startswith(f"{_HEAD}.")
    }
    if model_type(model) == "gpt2":
        heads = {}
    has_head = any(name.startswith(f"{_HEAD}.") for name in own)
    rest = {}
    for key in keys:
        if key in heads or (key.startswith(f"{_HEAD}.") and not (head and has_head)):
            continue
        here = key.replace("lm_head.decoder.", "lm_head.")
        if here.startswith("lm_head.") and here not in own:
            continue
        found = own.get(here.removeprefix(outer) if outer else here)
        rest[key] = [Slot(found[0], None, found[1])] if found else []
    return heads, rest


def _check(values: dict[str, torch.Tensor], slots: dict[str, Any], heads: dict[str, Any], rest: dict[str, Any]) -> None:
    wanted = {**slots, **heads}
    absent = sorted(set(wanted) - set(values))
    more = sorted({k for k in values if is_added(k) and k not in slots} | {k for k, to in rest.items() if not to})
    if absent or more:
        raise ValueError(f"path: missing keys {listed(absent)}; unexpected keys {listed(more)}")
    for key, targets in {**wanted, **rest}.items():
        for slot in targets:
            if tuple(values[key].shape) != slot.shape:
                raise ValueError(f"{key}: got shape {tuple(values[key].shape)}, expected {slot.shape}")


def _warn_about_base(model: nn.Module, values: dict[str, torch.Tensor], rest: dict[str, list[Slot]]) -> None:
    own = model.state_dict()
    different = [
        key
        for key, targets in rest.items()
        for s in targets
        if not torch.equal(own[s.name].cpu(), values[key].to(own[s.name].dtype))
    ]
    if different:
        logger.warning(
            "%d base weights in the file differ from the model's and replace them (first: %s); if that is not "
            "meant, the file belongs to another base model.",
            len(different),
            different[0],
        )


@torch.no_grad()
def _fill(model: nn.Module, values: dict[str, torch.Tensor], slots: dict[str, list[Slot]]) -> None:
    own = model.state_dict(keep_vars=True)
    by_plain_name = {name.replace(".base.", "."): value for name, value in own.items()}
    for key, targets in slots.items():
        for slot in targets:
            target = own.get(slot.name)
            target = by_plain_name[slot.name] if target is None else target
            (target if slot.expert is None else target[slot.expert]).copy_(values[key])
