"""save_adamix and load_adamix: one safetensors file, and the versioned JSON that commits it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .._backends import check_request
from .._extras import needed
from .._version import __version__
from ..modules import AdaptedLayer, RoutedLoRALinear
from ..modules.lora import linear_sizes
from ..routing import Router, process_rank
from ._files import (
    as_path,
    make_folder,
    remove_temporaries,
    sha256,
    unsealed,
    write_safetensors_by_digest,
    write_sealed_json,
)
from .config import AdaMixConfig
from .inject import adapt, build_layers
from .merging import mergeable, plain_lora
from .sharding import is_sharded, plain_class, put, whole
from .state import AdaMixState, adamix_state, check_model, replace_module
from .targets import model_type, saved_modules

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "adamix_checkpoint.json"
CHECKPOINT_VERSION = 2
UNSEALED_VERSION = 1  # its JSON holds no digest of itself
_FACTS = ("hidden_size", "num_hidden_layers", "vocab_size")
_SHOWN = 4


def save_adamix(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Writes what adapt() added to `model`, as it is now, into `directory`; returns the folder.

    Files: `adamix-<digest>.safetensors` (the banks and merge scores, the plain adapters after merge(), for a
    merged LoRA model the changed weights of the adapted layers, or a plain LoRA on a quantised one; and the
    trained head) and
    `adamix_checkpoint.json` (version, configuration, base model, layers, trainable flags, the tensor file's
    name, size and SHA-256, and the SHA-256 of all this). Every file appears in one step and the JSON comes
    last: an interrupted save leaves the previous checkpoint. The frozen base is not written.

    The experts that merge() keeps aside are not part of a merged model: save before merging to keep them.
    A model sharded with FSDP2 must be saved by every process; the first one writes.

    Args:
        model: returned by adapt() or load_adamix(). directory: made when missing; a previous checkpoint is replaced.

    Raises:
        ValueError: `model` is not adapted, or `directory` is a file.
        OSError: a file could not be written; the previous checkpoint stays.
    """
    state = adamix_state(model)
    layers = {path: model.get_submodule(path) for path in state.paths}
    tensors = _tensors(model, layers, state.saved)
    trainable = sorted(name for name, tensor in tensors.items() if tensor.requires_grad)
    folder = make_folder(directory)
    if any(is_sharded(tensor) for tensor in tensors.values()):
        tensors = {name: whole(tensor) for name, tensor in tensors.items()}
        if process_rank() != 0:
            return folder
    header = {
        "version": CHECKPOINT_VERSION,
        "package_version": __version__,
        "config": state.config.to_dict(),
        "merged": state.merged,
        "base_model": _base_facts(model),
        "layers": {path: _structure(layer) for path, layer in layers.items()},
        "saved_modules": state.saved,
        "trainable": trainable,
    }
    try:
        file, digest = write_safetensors_by_digest(folder, "adamix", tensors)
        tensor_file = {"file": file.name, "bytes": file.stat().st_size, "sha256": digest}
        write_sealed_json(folder / CHECKPOINT_NAME, {**header, "tensors": tensor_file})
    finally:
        _tidy(folder)
    logger.info("Saved the adaptation in %s (%d tensors, %d bytes)", folder, len(tensors), file.stat().st_size)
    return folder


def load_adamix(model: nn.Module, directory: str | os.PathLike[str], *, backend: str = "auto") -> nn.Module:
    """Puts a saved adaptation into `model` and returns it: the same bits, the same trainable flags.

    Args:
        model: the bare base model, which is adapted with the stored configuration (and is merged when the
            checkpoint is); or a model adapted to the same layers in the same way, which keeps its own
            routing, dropout and loss settings. An adapted model and its checkpoint must both be unmerged.
        directory: a folder of save_adamix.
        backend: for a bare model, as in adapt().

    Values are cast to the dtype that the model's own parameter has.

    Raises:
        ValueError: a file is missing, truncated, corrupt or of an unknown version; the model is another one;
            a tensor is missing, unexpected or of another shape. Everything is checked before `model` changes.
    """
    check_model(model)
    check_request(backend)
    folder = as_path("directory", directory)
    header = read_header(folder / CHECKPOINT_NAME)
    config, merged = AdaMixConfig.from_dict(header["config"]), header["merged"]
    _check_base(model, header)
    tensors = _read_tensors(folder, header["tensors"])
    bare = getattr(model, "adamix", None) is None
    if not bare and (adamix_state(model).merged or merged):
        raise ValueError(
            f"model: got an adapted model ({_word(adamix_state(model).merged)}) for a checkpoint that is "
            f"{_word(merged)}, expected both unmerged, or a bare model"
        )
    layers: Mapping[str, nn.Module]
    if bare:
        layers = build_layers(model, config, Router())
    else:
        layers = {path: model.get_submodule(path) for path in adamix_state(model).paths}
    if merged:
        layers = {path: _merged_layer(layer) for path, layer in layers.items()}
    saved = [p for p, _ in saved_modules(model, config.modules_to_save)] if bare else adamix_state(model).saved
    _check_same("layers", list(header["layers"]), list(layers))
    _check_same("saved_modules", header["saved_modules"], saved)
    for path, layer in layers.items():
        _check_structure(path, header["layers"][path], _structure(layer))
    _check_tensors(tensors, _tensors(model, layers, saved))

    if bare:
        adapt(model, config, backend=backend)
        if merged:
            _become_merged(model)
    _fill(model, tensors, set(header["trainable"]))
    return model


def _tidy(folder: Path) -> None:
    """Removes the tensor files that the JSON on the disk does not name, and what killed processes left."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        path = folder / CHECKPOINT_NAME
        wanted = json.loads(path.read_text(encoding="utf-8"))["tensors"]["file"] if path.exists() else None
        for file in folder.glob("adamix-*.safetensors"):
            if file.name != wanted:
                file.unlink(missing_ok=True)
        remove_temporaries(folder)


def _tensors(model: nn.Module, layers: Mapping[str, nn.Module], saved: list[str]) -> dict[str, torch.Tensor]:
    """Everything a checkpoint of `model` holds, by its name in the model. layers may stand outside it."""
    found: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        if isinstance(layer, (AdaptedLayer, RoutedLoRALinear)):
            own: dict[str, Any] = {n: p for n, p in layer.named_parameters() if not n.startswith("base.")}
        else:
            own = {"weight": layer.weight}
        found.update({f"{path}.{name}": value for name, value in own.items()})
    for path in saved:
        values = model.get_submodule(path).state_dict(keep_vars=True)
        found.update({f"{path}.{name}": value for name, value in values.items()})
    return found


def _structure(layer: nn.Module) -> dict[str, Any]:
    """What decides the shapes and the meaning of one adapted layer's tensors."""
    base = layer.base if isinstance(layer, (AdaptedLayer, RoutedLoRALinear)) else layer
    inputs, outputs, transposed = linear_sizes(base)
    facts = {"in_features": inputs, "out_features": outputs, "fan_in_fan_out": transposed}
    names: tuple[str, ...]
    holder: nn.Module
    if isinstance(layer, AdaptedLayer):
        names, holder = ("bottleneck", "num_experts", "share", "activation"), layer.adapter
    elif isinstance(layer, RoutedLoRALinear):
        names, holder = ("r", "alpha", "num_experts", "share", "output_offsets"), layer
    else:
        return facts
    facts.update({name: getattr(holder, name) for name in names})
    as_read: dict[str, Any] = json.loads(json.dumps(facts))
    return as_read


def _merged_layer(layer: nn.Module) -> nn.Module:
    if isinstance(layer, AdaptedLayer):
        return AdaptedLayer(layer.base, layer.adapter.merged())
    lora = cast("RoutedLoRALinear", layer)
    return lora.base if mergeable(lora) else plain_lora(lora)


def _become_merged(model: nn.Module) -> None:
    state = adamix_state(model)
    for path in state.paths:
        layer = model.get_submodule(path)
        if isinstance(layer, AdaptedLayer):
            layer.adapter = layer.adapter.merged()
        else:
            replace_module(model, path, _merged_layer(layer))
    state.merged = True


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], trainable: set[str]) -> None:
    state: AdaMixState = adamix_state(model)
    layers = {path: model.get_submodule(path) for path in state.paths}
    for name, target in _tensors(model, layers, state.saved).items():
        put(target, tensors[name])
        if target.is_floating_point():
            target.requires_grad_(name in trainable)


def _base_facts(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    facts = {"class": plain_class(model).__name__, "model_type": model_type(model)}
    facts["name_or_path"] = getattr(config, "_name_or_path", None) or None
    facts.update({name: getattr(config, name, None) for name in _FACTS})
    return facts


def read_header(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint. Raises ValueError, naming the file, for any other or a damaged one."""
    if not path.is_file():
        raise ValueError(f"{path}: got no such file, expected a folder written by save_adamix")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got a file that is not JSON ({error}), expected an AdaMix checkpoint") from error
    version = header.get("version") if isinstance(header, dict) else None
    if version not in (UNSEALED_VERSION, CHECKPOINT_VERSION):
        raise ValueError(f"{path}: got version {version!r}, expected 1 or 2, those this release reads")
    if version != UNSEALED_VERSION:
        unsealed(header, path)
    kinds = {"config": dict, "merged": bool, "base_model": dict, "layers": dict, "tensors": dict}
    for name, kind in {**kinds, "saved_modules": list, "trainable": list}.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(f"{path}: got {name} = {header.get(name)!r}, expected a JSON {kind.__name__}")
    for name, layer in header["layers"].items():
        if not isinstance(layer, dict):
            raise ValueError(f"{path}: got layers[{name!r}] = {layer!r}, expected a JSON dict")
    checked: dict[str, Any] = header
    return checked


def _check_base(model: nn.Module, header: dict[str, Any]) -> None:
    stored, here = header["base_model"], _base_facts(model)
    for name in ("model_type", *_FACTS):
        if stored.get(name) != here[name]:
            raise ValueError(
                f"model: got a {here['class']} with {name} = {here[name]!r}, expected {stored.get(name)!r}, "
                f"as in the {stored.get('class')} that the checkpoint was saved from"
            )


def _read_tensors(folder: Path, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
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


def _check_same(name: str, stored: list[str], here: list[str]) -> None:
    absent, more = sorted(set(stored) - set(here)), sorted(set(here) - set(stored))
    if absent or more:
        raise ValueError(
            f"{name}: the model lacks {_list(absent)} and has {_list(more)} besides, expected the checkpoint's {name}"
        )


def _check_structure(path: str, stored: dict[str, Any], here: dict[str, Any]) -> None:
    for name in {**stored, **here}:
        if stored.get(name) != here.get(name):
            raise ValueError(f"{path}: got {name} = {here.get(name)!r} in the model, expected {stored.get(name)!r}")


def _check_tensors(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    absent, more = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if absent or more:
        raise ValueError(f"checkpoint: missing keys {_list(absent)}, unexpected keys {_list(more)}")
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected {tuple(wanted[name].shape)} in the model"
            )


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "none"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _word(merged: bool) -> str:
    return "merged" if merged else "unmerged"
