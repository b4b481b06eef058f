"""save_adamix and load_adamix: one safetensors file, and the versioned JSON that commits it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .._backends import check_request
from .._version import __version__
from ..modules import AdaptedLayer, RoutedLoRALinear
from ..routing import Router, process_rank
from ._files import make_folder, one_writer, remove_unnamed, write_safetensors_by_digest, write_sealed_json
from ._staging import staged
from .centroid import Centroid
from .config import AdaMixConfig
from .factors import NAMES, Factors
from .header import (
    CHECKPOINT_NAME,
    CHECKPOINT_VERSION,
    base_facts,
    check_base,
    check_class,
    check_no_pack_in,
    check_pooling,
    check_same,
    check_states,
    check_structure,
    check_tensors,
    listed,
    other_weights,
    read_header,
    read_tensors,
    structure,
)
from .hub import resolve_folder
from .inject import adapt, build_layers
from .merging import mergeable, plain_lora
from .pooling import set_pooling
from .sharding import is_sharded, put, whole
from .state import adamix_state, check_model, check_no_pack, replace_module
from .targets import BELOW_CLASSIFIER, saved_modules
from .tying import shared_parameters

logger = logging.getLogger(__name__)

_FACTORS = "factors"


def save_adamix(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes what adapt() added to `model`, as it is now, into `directory`; returns the folder.

    Files: `adamix-<digest>.safetensors` (the banks and merge scores, the plain adapters after merge(), for a merged
    LoRA model the changed weights of the adapted layers and the factors they were merged from, or a plain LoRA on a
    quantised or tied one; and the trained head) and `adamix_checkpoint.json` (version, configuration, base model with
    its configuration and a few of its frozen values, layers, trainable flags, the tensor file's name, size and SHA-256,
    and the SHA-256 of all this). Every file appears in one step and the JSON comes last: an interrupted save leaves
    the previous checkpoint. The frozen base is not written; a base that is a folder of this disk is named, and
    found again from `directory` as long as both stand as they do to each other.

    Merged LoRA weights are stored although base + factors would give them: a matrix product rounds differently on
    another processor or backend, and what is loaded has the bits that were saved. The factors, r (K + N) values beside
    K N, are there for export_peft and for packs.

    The experts that merge() keeps aside are not part of a merged model: save before merging to keep them.
    A model sharded with FSDP2 must be saved by every process; the first one writes.

    Args:
        model: returned by adapt() or load_adamix(). directory: made when missing; a previous checkpoint is replaced.
        state_dict: values by name that stand for the model's own, as a trainer gathers them; a name that is not in
            it has the model's.

    Raises:
        ValueError: `model` is not adapted, a value of state_dict has another shape, or `directory` is a file or holds
            a pack.
        OSError: a file could not be written; the previous checkpoint stays.

    Example:
        >>> sorted(path.name for path in save_adamix(adapt(model), "experts").iterdir())  # doctest: +ELLIPSIS
        ['adamix-...safetensors', 'adamix_checkpoint.json']
    """
    return write_checkpoint(model, directory, state_dict)


def write_checkpoint(
    model: nn.Module,
    directory: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor] | None = None,
    here: bool = True,
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """save_adamix; where the files do not stay `here`, the way from them to a local base has no meaning, and is left
    out. beside: writes what else the folder needs into a place from which all takes its own, before the JSON."""
    state = adamix_state(model)
    check_no_pack(model, "save")
    layers = {path: model.get_submodule(path) for path in state.paths}
    tensors = _tensors(model, layers, state.saved)
    trainable = sorted(name for name, tensor in tensors.items() if tensor.requires_grad)
    tensors = tensors if state_dict is None else _replaced(tensors, state_dict)
    factors = {path: f for path, f in state.factors.items() if not isinstance(layers[path], RoutedLoRALinear)}
    folder = make_folder(directory)
    check_no_pack_in(folder)
    if any(is_sharded(tensor) for tensor in tensors.values()):
        tensors = {name: whole(tensor) for name, tensor in tensors.items()}
        if process_rank() != 0:
            return folder
    for path, found in factors.items():
        tensors |= {f"{path}.{name}": value for name, value in zip(NAMES, found.merged_factors(), strict=True)}
    header = {
        "version": CHECKPOINT_VERSION,
        "package_version": __version__,
        "config": state.config.to_dict(),
        "merged": state.merged,
        "base_model": base_facts(model, folder, here),
        "layers": {path: _described(layer, factors.get(path)) for path, layer in layers.items()},
        "saved_modules": state.saved,
        "trainable": trainable,
        **({} if state.centroid is None else {"centroid": state.centroid.to_json()}),
    }
    with one_writer(folder):
        check_no_pack_in(folder)  # another process may have written one while this one waited
        try:
            file, digest = write_safetensors_by_digest(folder, "adamix", tensors)
            size = file.stat().st_size
            tensor_file = {"file": file.name, "bytes": size, "sha256": digest}
            with staged(folder, CHECKPOINT_NAME) as place:
                if beside is not None:
                    beside(place)
                write_sealed_json(place / CHECKPOINT_NAME, {**header, "tensors": tensor_file})
        finally:
            remove_unnamed(folder / CHECKPOINT_NAME, "adamix")
    logger.info("Saved the adaptation in %s (%d tensors, %d bytes)", folder, len(tensors), size)
    return folder


def load_adamix(
    model: nn.Module, directory: str | os.PathLike[str], *, revision: str | None = None, backend: str = "auto"
) -> nn.Module:
    """Puts a saved adaptation into `model` and returns it: the same bits, the same trainable flags.

    Args:
        model: the bare base model, which is adapted with the stored configuration (and is merged when the
            checkpoint is), with a warning where its class or its frozen weights are not those of the training; or
            a model adapted to the same layers in the same way, which keeps its own routing, dropout and loss
            settings. An adapted model and its checkpoint must both be unmerged, or both merged; then the experts that
            merge() kept in the model are dropped, since they are not those of the checkpoint.
        directory: a folder of save_adamix, save_pretrained or a trainer; or "user/repo" on the Hub.
        revision: of the repository.
        backend: for a bare model, as in adapt().

    Values are cast to the dtype that the model's own parameter has. A head that was trained on the mean of the hidden
    states reads the mean here, too.

    Raises:
        ValueError: a file is missing, truncated, corrupt or of an unknown version; the repository cannot be had; the
            model is another one, or of another task; a tensor is missing, unexpected or of another shape. Everything is
            checked before `model` changes.

    Example:
        >>> import copy
        >>> bare = copy.deepcopy(model)
        >>> folder = save_adamix(adapt(model).eval(), "experts")
        >>> torch.equal(load_adamix(bare, folder).eval()(**batch).logits, model(**batch).logits)
        True
    """
    check_model(model)
    check_request(backend)
    folder = resolve_folder(directory, revision, "directory")
    header = read_header(folder / CHECKPOINT_NAME)
    config, merged = AdaMixConfig.from_dict(header["config"]), header["merged"]
    check_base(model, header)
    pooling = check_pooling(model, header)
    tensors = read_tensors(folder, header["tensors"])
    centroid = Centroid.read(folder / CHECKPOINT_NAME, header.get("centroid"))
    bare = getattr(model, "adamix", None) is None
    if not bare:
        check_no_pack(model, "load into")
    layers: Mapping[str, nn.Module]
    if bare:
        layers = build_layers(model, config, Router())
        shared = shared_parameters(model)
        layers = {path: _merged_layer(layer, shared) for path, layer in layers.items()} if merged else layers
        saved = [path for path, _ in saved_modules(model, config.modules_to_save, config.task_type)]
        if {*BELOW_CLASSIFIER, *header["saved_modules"]} > {*saved} > {*header["saved_modules"]}:  # of an older release
            saved = header["saved_modules"]
            config = dataclasses.replace(config, modules_to_save=saved, task_type=None)
    else:
        check_states(adamix_state(model).merged, merged)
        layers = {path: model.get_submodule(path) for path in adamix_state(model).paths}
        saved = adamix_state(model).saved
    check_same("layers", list(header["layers"]), list(layers))
    check_same("saved_modules", header["saved_modules"], saved)
    factors = _pop_factors(header["layers"], tensors)
    for path, layer in layers.items():
        check_structure(path, header["layers"][path], structure(layer))
    check_tensors(tensors, _tensors(model, layers, saved))

    another = check_class(model, header)
    if another is not None:
        logger.warning("%s; what %s computes in it may not be what was trained", another, folder)
    different = other_weights(model, header)
    if different is not None:
        logger.warning("%s; what %s computes on it is not what was trained", different, folder)
    if bare:
        adapt(model, config, backend=backend)
        if merged:
            _become_merged(model)
    if pooling is not None:
        set_pooling(model, pooling)
    state = adamix_state(model)
    state.stash.clear()
    state.factors = factors
    state.centroid = centroid
    state.lost = "a merged checkpoint was loaded" if merged else ""
    state.origin = header["tensors"]["sha256"] if merged else ""
    _fill(model, tensors, set(header["trainable"]))
    return model


def _tensors(model: nn.Module, layers: Mapping[str, nn.Module], saved: list[str]) -> dict[str, torch.Tensor]:
    """What a checkpoint of `model` holds of its tensors, by their names in it. layers may stand outside it."""
    found: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        if isinstance(layer, (AdaptedLayer, RoutedLoRALinear)):
            owned = (*layer.named_parameters(), *layer.named_buffers())  # the gates' means are buffers
            own: dict[str, Any] = {
                n: p for n, p in owned if not n.startswith("base.") and not n.endswith(".directions")
            }
        else:
            own = {"weight": layer.weight}
        found.update({f"{path}.{name}": value for name, value in own.items()})
    for path in saved:
        values = model.get_submodule(path).state_dict(keep_vars=True)
        found.update({f"{path}.{name}": value for name, value in values.items()})
    return found


def _replaced(own: dict[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: given.get(name, value) for name, value in own.items()}
    absent = [name for name, value in found.items() if is_sharded(value)]
    if absent:  # only one process may be here: the others would not answer
        raise ValueError(f"state_dict: got none of {listed(absent)}, which are sharded, expected their whole values")
    for name, value in found.items():
        if own[name].numel() and value.shape != own[name].shape:  # what is partitioned away has no shape here
            raise ValueError(
                f"state_dict: got {name} of shape {tuple(value.shape)}, expected that in the model, "
                f"{tuple(own[name].shape)}"
            )
    return found


def _described(layer: nn.Module, factors: Factors | None) -> dict[str, Any]:
    return {**structure(layer), **({} if factors is None else {_FACTORS: factors.to_json()})}


def _pop_factors(layers: dict[str, dict[str, Any]], tensors: dict[str, torch.Tensor]) -> dict[str, Factors]:
    """Takes the factors out of the header's layers and out of the tensors. Raises ValueError, naming the layer."""
    found = {}
    for path in [path for path, layer in layers.items() if _FACTORS in layer]:
        absent = [f"{path}.{name}" for name in NAMES if f"{path}.{name}" not in tensors]
        if absent:
            raise ValueError(f"checkpoint: missing keys {listed(absent)}, the factors of a merged layer")
        values = {name: tensors.pop(f"{path}.{name}") for name in NAMES}
        found[path] = Factors.read(path, layers[path].pop(_FACTORS), layers[path], values)
    return found


def _merged_layer(layer: nn.Module, shared: Mapping[int, object]) -> nn.Module:
    if isinstance(layer, AdaptedLayer):
        return AdaptedLayer(layer.base, layer.adapter.merged())
    lora = cast("RoutedLoRALinear", layer)
    return lora.base if mergeable(lora, shared) else plain_lora(lora)


def _become_merged(model: nn.Module) -> None:
    state, shared = adamix_state(model), shared_parameters(model)
    for path in state.paths:
        layer = model.get_submodule(path)
        if isinstance(layer, AdaptedLayer):
            layer.adapter = layer.adapter.merged()
        else:
            replace_module(model, path, _merged_layer(layer, shared))
    state.merged = True


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], trainable: set[str]) -> None:
    state = adamix_state(model)
    layers = {path: model.get_submodule(path) for path in state.paths}
    for name, target in _tensors(model, layers, state.saved).items():
        put(target, tensors[name])
        if target.is_floating_point():
            target.requires_grad_(name in trainable)
