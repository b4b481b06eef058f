"""adamix_checkpoint.json: what a checkpoint says of itself, and how that is held against a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._extras import needed
from ..modules import AdaptedLayer, RoutedLoRALinear
from ..modules.lora import linear_sizes
from ._files import read_versioned, sha256
from .base_weights import others, sampled
from .hub import with_names
from .pooling import MARK, head_reads, pooling_of
from .sharding import plain_class
from .targets import model_type

CHECKPOINT_NAME = "adamix_checkpoint.json"
PACK_NAME = "adamix_pack.json"
CHECKPOINT_VERSION = 3
UNSEALED_VERSION = 1  # its JSON holds no digest of itself
_READABLE = (1, 2, 3)
_FACTS = ("hidden_size", "num_hidden_layers", "vocab_size")
# Where the base was read from, the pooling, which has its own entry, and whether generate() may trust config.json.
_OF_THIS_PROCESS = ("_name_or_path", MARK, "_from_model_config")
_SHOWN = 4
_NO_CLASS = ("None", "OptimizedModule")  # what an older release wrote of a compiled model
_TASKS = (
    "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "CausalLM", "LMHeadModel",
    "MaskedLM", "ConditionalGeneration",
)  # fmt: skip


def base_facts(model: nn.Module, folder: Path | None = None, here: bool = True) -> dict[str, Any]:
    """Which model the adaptation belongs to; for a `folder`, also all that builds it anew (see tasks.load).

    here: whether the folder stays where it is, so that the way from it to a base on this disk means something.
    """
    config = getattr(model, "config", None)
    facts: dict[str, Any] = {"class": plain_class(model).__name__, "model_type": model_type(model)}
    facts.update({name: getattr(config, name, None) for name in _FACTS})
    if folder is None:
        return facts
    name = getattr(config, "_name_or_path", None) or None
    names = {} if name is None else with_names({"base": name}, folder)
    facts.update(name_or_path=names.get("base"), folder=names.get("base_path") if here else None)
    facts.update(pooling=pooling_of(model), dtype=_dtype(model), config=_as_json(config))
    facts["generation"] = _as_json(getattr(model, "generation_config", None))
    facts["weights"] = sampled(model)
    return facts


def _dtype(model: nn.Module) -> str | None:
    dtype = getattr(model, "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _as_json(config: Any) -> dict[str, Any] | None:
    """A configuration of transformers (sizes, labels, quantisation) without its place on this disk; None for others."""
    if not hasattr(config, "to_json_string"):
        return None
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return {name: value for name, value in values.items() if name not in _OF_THIS_PROCESS}


def structure(layer: nn.Module) -> dict[str, Any]:
    """What decides the shapes and the meaning of one adapted layer's tensors."""
    base = layer.base if isinstance(layer, (AdaptedLayer, RoutedLoRALinear)) else layer
    inputs, outputs, transposed = linear_sizes(base)
    facts: dict[str, Any] = {"in_features": inputs, "out_features": outputs, "fan_in_fan_out": transposed}
    names: tuple[str, ...]
    holder: Any
    if isinstance(layer, AdaptedLayer):
        names, holder = ("bottleneck", "num_experts", "share", "activation"), layer.adapter
    elif isinstance(layer, RoutedLoRALinear):
        names, holder = ("r", "alpha", "num_experts", "share", "output_offsets"), layer
    else:
        return facts
    facts.update({name: getattr(holder, name) for name in names})
    if holder.gate is not None:  # absent in older headers, too
        facts.update(gate=type(holder.gate).__name__, top_k=getattr(holder.gate, "top_k", None), mix=holder.mix)
    if getattr(holder, "use_rslora", False):  # absent in older headers, which know of no other scaling
        facts["use_rslora"] = True
    as_read: dict[str, Any] = json.loads(json.dumps(facts))
    return as_read


def read_header(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint. Raises ValueError, naming the file, for any other or a damaged one."""
    writer, content = "a folder written by save_adamix", "an AdaMix checkpoint"
    header = read_versioned(path, writer, content, _READABLE, UNSEALED_VERSION)
    kinds = {"config": dict, "merged": bool, "base_model": dict, "layers": dict, "tensors": dict}
    for name, kind in {**kinds, "saved_modules": list, "trainable": list}.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(f"{path}: got {name} = {header.get(name)!r}, expected a JSON {kind.__name__}")
    for name, layer in header["layers"].items():
        if not isinstance(layer, dict):
            raise ValueError(f"{path}: got layers[{name!r}] = {layer!r}, expected a JSON dict")
    return header


def read_tensors(folder: Path, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that a header's entry names. Raises ValueError, naming the file, where they are not those."""
    with needed("load_adamix"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

    name = entry.get("file")
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{folder / CHECKPOINT_NAME}: got tensors.file = {name!r}, expected a file name")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path}: got no such file, expected the tensors of {CHECKPOINT_NAME}")
    size = path.stat().st_size
    if size != entry.get("bytes"):
        raise ValueError(f"{path}: got {size} bytes, expected {entry.get('bytes')}; the file is truncated or replaced")
    digest = sha256(path)
    if digest != entry.get("sha256"):
        raise ValueError(f"{path}: got SHA-256 {digest}, expected {entry.get('sha256')}; the file is corrupt")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: got a file that safetensors cannot read ({error})") from error


def check_base(model: nn.Module, header: dict[str, Any]) -> None:
    """Raises ValueError where `model` is not of the kind and the sizes that the checkpoint was saved from."""
    stored, here = header["base_model"], base_facts(model)
    for name in ("model_type", *_FACTS):
        if stored.get(name) != here[name]:
            raise ValueError(
                f"model: got a {here['class']} with {name} = {here[name]!r}, expected {stored.get(name)!r}, "
                f"as in the {stored.get('class')} that the checkpoint was saved from"
            )


def check_no_pack_in(folder: Path) -> None:
    """Raises ValueError for a folder of save_pack: the next save of either would remove the other's tensors."""
    if (folder / PACK_NAME).exists():
        raise ValueError(f"directory: got {str(folder)!r}, which holds a pack, expected another folder")


def other_weights(model: nn.Module, header: dict[str, Any]) -> str | None:
    """What to say where `model` fits, but has not the frozen weights that the checkpoint was trained on; None where it
    has them, or an older checkpoint does not tell them."""
    stored = header["base_model"]
    if not others(model, stored.get("weights") or {}):
        return None
    return (
        f"model: got a {plain_class(model).__name__} with other frozen weights than the one that the checkpoint was "
        f"trained on ({stored.get('name_or_path')}), expected the same base model, not one of the same sizes alone"
    )


def check_class(model: nn.Module, header: dict[str, Any]) -> str | None:
    """What to say where `model` fits, but is of another class than the checkpoint's; None for that one, or one made of
    it. Raises ValueError where modules were trained whole for another task: their sizes may be the same."""
    kind, stored = plain_class(model), str(header["base_model"].get("class"))
    if stored in {*(base.__name__ for base in kind.__mro__), *_NO_CLASS}:
        return None
    said = f"model: got a {kind.__name__}, expected a {stored}, which the checkpoint was saved from"
    tasks = {next((task for task in _TASKS if name.endswith(task)), None) for name in (kind.__name__, stored)}
    if header["saved_modules"] and len(tasks) == 2 and None not in tasks:
        raise ValueError(f"{said}: {listed(header['saved_modules'])} was trained for another task")
    return said


def check_pooling(model: nn.Module, header: dict[str, Any]) -> str | None:
    """The pooling that the checkpoint's head was trained on. Raises ValueError where the model's is set otherwise, or
    can be no mean."""
    stored: str | None = header["base_model"].get("pooling")
    here = pooling_of(model)
    if stored is not None and here is not None and stored != here:
        raise ValueError(
            f"model: got one whose head reads pooling {here!r}, expected {stored!r}, as in the checkpoint: "
            f"load_classifier(..., pooling={stored!r}), or adamix_kernels.load(folder)"
        )
    if stored == "mean" != here and head_reads(model) is None:
        raise ValueError(
            f"model: got a {type(model).__name__}, whose head reads neither a pooler nor the first token, expected a "
            f"{header['base_model'].get('class')}, whose head reads the mean, as in the checkpoint"
        )
    return stored


def check_states(here: bool, stored: bool) -> None:
    """Whether an adapted model and a checkpoint are merged: both, or neither."""
    if here == stored:
        return
    if stored:
        raise ValueError(
            "model: got an unmerged model for a checkpoint that is merged, expected a bare model, which is adapted and "
            "merged for it, or merge(model) first; its own experts would be lost"
        )
    raise ValueError(
        "model: got a merged model for a checkpoint that holds the experts, expected a bare model, or unmerge(model) "
        "first"
    )


def check_same(name: str, stored: list[str], here: list[str]) -> None:
    absent, more = sorted(set(stored) - set(here)), sorted(set(here) - set(stored))
    if absent or more:
        raise ValueError(
            f"{name}: the model lacks {listed(absent)} and has {listed(more)} besides, expected the checkpoint's {name}"
        )


def check_structure(path: str, stored: dict[str, Any], here: dict[str, Any]) -> None:
    if "r" in here and "r" not in stored:
        raise ValueError(
            f"{path}: got a weight that takes no update, being quantised or another layer's, too (tied), expected one "
            "of this layer alone, for the checkpoint's LoRA was merged into it: load the unmerged checkpoint and merge"
        )
    for name in {**stored, **here}:
        if stored.get(name) != here.get(name):
            raise ValueError(f"{path}: got {name} = {here.get(name)!r} in the model, expected {stored.get(name)!r}")


def listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(names[:_SHOWN]) or "none"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def check_tensors(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The names and shapes that a file holds are those of the model."""
    absent, more = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if absent or more:
        raise ValueError(f"checkpoint: missing keys {listed(absent)}, unexpected keys {listed(more)}")
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected {tuple(wanted[name].shape)} in the model"
            )
