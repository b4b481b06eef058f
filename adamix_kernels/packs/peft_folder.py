"""A LoRA folder of Hugging Face PEFT as a source of a pack. PEFT itself is not needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._extras import needed
from ..models._files import read_json
from ..models.targets import named
from ..modules._banks import lora_scaling
from ..modules.lora import linear_sizes
from .sources import LoraPart, Part, Source

CONFIG_NAME = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What says the same to a reader of the tensors, whatever it is.
_TOLD = frozenset(
    (
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
        "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
        "revision", "target_modules", "task_type", "use_rslora",
    )
)  # fmt: skip
_DEFAULTS: tuple[Any, ...] = (None, False, {}, [], "", "none")
# Initialisations that change the base's weights: their LoRA is one of that base alone.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
_HEADS = ("classifier", "score", "qa_outputs")


@torch.no_grad()
def read_peft(name: str, folder: Path, model: nn.Module) -> Source:
    """adapter_config.json and adapter_model.safetensors: the LoRA of linear layers and the modules saved whole.

    The scaling, alpha / r or alpha / sqrt(r), with PEFT's rank_pattern and alpha_pattern, goes into B.

    Args:
        model: the bare base, whose modules the keys name.

    Raises ValueError, naming what a pack cannot hold: DoRA, trained biases, a LoRA of an embedding or a convolution,
        an initialisation that changes the base, another kind of PEFT than LoRA; a missing or damaged file.
    """
    config = peft_config(folder / CONFIG_NAME)
    tensors = _tensors(folder)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    heads: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        path = key.removeprefix(_PREFIX)
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", path)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = value
        elif "lora_" in path.rpartition(".")[0] or "lora_" in path.rpartition(".")[2]:
            raise ValueError(f"{folder / _WEIGHTS}: got {key!r}, expected a LoRA of linear layers alone, without bias")
        else:
            place, rest = _head(path, config, model, folder)
            heads.setdefault(place, {})[rest] = value
    layers: dict[str, Part] = {}
    for path, pair in pairs.items():
        layers[path] = _part(path, pair, config, model, folder)
    if not layers:
        raise ValueError(f"{folder / _WEIGHTS}: got no lora_A and lora_B, expected those of some layers")
    return Source(name, folder, layers, heads)


def peft_config(path: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, for what is no configuration of a LoRA, or of one that a pack cannot hold."""
    config = read_json(path, "a LoRA configuration")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: got peft_type {kind!r}, expected 'LORA'")
    foreign = {key: value for key, value in config.items() if key not in _TOLD and value not in _DEFAULTS}
    if foreign:
        told = ", ".join(f"{key}={value!r}" for key, value in sorted(foreign.items()))
        raise ValueError(f"{path}: got {told}, which a pack cannot hold, expected a plain LoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise ValueError(
            f"{path}: got init_lora_weights={start!r}, which changed the base's weights, expected a LoRA converted by "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{path}: got {key}={value!r}, expected a number above 0")
        patterns = config.get(_PATTERNS[key]) or {}
        if not isinstance(patterns, dict) or not all(_is_rule(*rule) for rule in patterns.items()):
            raise ValueError(f"{path}: got {_PATTERNS[key]}={patterns!r}, expected regular expressions with numbers")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{path}: got modules_to_save={saved!r}, expected names in a list")
    return config


def _is_rule(expression: str, value: object) -> bool:
    try:
        re.compile(expression)
    except re.error:
        return False
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    with needed("pack"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

    path = folder / _WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        more = "; adapter_model.bin is a pickle, which is not opened: save it anew with PEFT" if pickled else ""
        raise ValueError(f"{path}: got no such file, expected the tensors of a LoRA{more}")
    try:
        found: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: got a file that safetensors cannot read ({error})") from error
    return found


def _part(path: str, pair: dict[str, torch.Tensor], config: dict[str, Any], model: nn.Module, folder: Path) -> LoraPart:
    where = f"{folder / _WEIGHTS}: {path}"
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{where}: got lora_{''.join(pair)} alone, expected lora_A and lora_B")
    lora_a, lora_b = pair["A"], pair["B"]
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        shapes = f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        raise ValueError(f"{where}: got lora_A and lora_B of shapes {shapes}, expected [r, K] and [N, r]")
    rank = lora_a.shape[0]
    wanted = int(_pattern(config.get("rank_pattern"), path, config["r"]))
    if rank != wanted:
        raise ValueError(f"{where}: got rank {rank}, expected {wanted}, as in {CONFIG_NAME}")
    alpha = float(_pattern(config.get("alpha_pattern"), path, config["lora_alpha"]))
    scaling = lora_scaling(alpha, rank, bool(config.get("use_rslora")))
    try:
        _, columns, _ = linear_sizes(model.get_submodule(path))
    except (AttributeError, ValueError):
        columns = lora_b.shape[0]  # fit() says that the layer is missing, or is no linear one
    return LoraPart(lora_a, lora_b.float() * scaling, (0,), columns)


def _pattern(patterns: Any, path: str, default: Any) -> Any:
    """PEFT's rule: the first key, a regular expression, that is the path or a dotted end of it."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _head(path: str, config: dict[str, Any], model: nn.Module, folder: Path) -> tuple[str, str]:
    """(path of the module saved whole, name within it)."""
    path = path.replace(".modules_to_save.", ".")
    names = [*(config.get("modules_to_save") or ()), *_HEADS]
    parts = path.split(".")
    for end in range(1, len(parts)):
        place = ".".join(parts[:end])
        if named(place, names):
            return place, ".".join(parts[end:])
    raise ValueError(f"{folder / _WEIGHTS}: got {path!r}, which modules_to_save does not name, expected LoRA and heads")


def head_rows(folder: Path) -> int | None:
    """How many labels the classifier in the folder has; None where there is none."""
    for key, value in _tensors(folder).items():
        if key.rpartition(".")[0].rpartition(".")[2] in (*_HEADS, "out_proj") and key.endswith(".weight"):
            return value.shape[0]
    return None
