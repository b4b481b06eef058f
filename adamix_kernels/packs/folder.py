"""unpack, save_pack, load_pack: a name as a checkpoint of its own, and all of them in one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._backends import check_request
from .._version import __version__
from ..models._files import (
    make_folder,
    one_writer,
    read_versioned,
    remove_unnamed,
    write_json,
    write_safetensors_by_digest,
    write_sealed_json,
)
from ..models._staging import staged
from ..models.config import AdaMixConfig
from ..models.header import CHECKPOINT_NAME, CHECKPOINT_VERSION, PACK_NAME, base_facts, check_no_pack_in
from ..models.hub import resolve_folder
from ..models.inject import check_bare
from ..models.run_values import RUN_NAME, of_model, run_to_json, sealed_run
from ..models.state import adamix_state, check_model
from ..modules.lora import QKV, linear_sizes
from . import heads, slots
from .beside import old_runs, remove_runs, run_of_name
from .pack import assemble
from .reading import Folder, called, check_source, wanted_names
from .slots import Shape
from .sources import AdapterPart, LoraPart, Part, read_adamix
from .state import Entry, check_name, pack_of
from .words import DIGESTS, digests, left_over, write_files

logger = logging.getLogger(__name__)
_VERSION = 1
_STEM = "adamix"


def unpack(model: nn.Module, name: str, directory: str | os.PathLike[str]) -> Path:
    """Writes one name of a pack as a checkpoint of its own, which load_adamix, load and pack read; returns the folder.

    A name of adapters becomes a merged checkpoint, one of LoRA a checkpoint of one expert whose B holds the scaling
    (alpha = r), so that it can be trained on, merged and exported. Its run file and the tokenizer come along, where the
    pack has them. The pack stays as it is.

    Raises:
        ValueError: `model` is no pack or has no such name, or `directory` is a file or holds a pack.
        OSError: a file could not be written; a previous checkpoint stays.

    Example:
        >>> folder = unpack(pack(model, {"leases": leases, "patents": patents}), "leases", "leases_again")
        >>> (folder / "adamix_checkpoint.json").is_file()
        True
    """
    state = pack_of(model)
    with state.lock:
        entry = state.entry(check_name(name))
        for path in entry.heads:
            heads.check_untied(model, path)  # load_adamix would write PEFT's copy into both
        folder = make_folder(directory)
        with one_writer(folder):
            check_no_pack_in(folder)
            try:
                left = left_over(folder, CHECKPOINT_NAME, state.tokenizer)
                header = {**_write_name(model, entry, folder, True), DIGESTS: digests(state.tokenizer)}
                with staged(folder, CHECKPOINT_NAME) as place:
                    write_files(place, state.tokenizer)
                    if entry.run is not None:
                        write_json(place / RUN_NAME, sealed_run(of_model(entry.run, model), folder))
                    write_sealed_json(place / CHECKPOINT_NAME, header)
                _remove(left)
                if entry.run is None:
                    (folder / RUN_NAME).unlink(missing_ok=True)  # of what was here before
            finally:
                remove_unnamed(folder / CHECKPOINT_NAME, _STEM)
    return folder


def save_pack(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Writes all names of a pack into one folder, which load_pack and load read; returns the folder.

    Files: `adamix-<digest>.safetensors`, one a name, the tokenizer where a folder brought one, and `adamix_pack.json`,
    which names the tensors, their base model and the room of the pack, and holds each name's run file. The JSON comes
    last and knows the SHA-256 of all tensors: an interrupted save leaves the previous pack. The frozen base is not
    written.

    Raises:
        ValueError: `model` is no pack, it is empty, or `directory` is a file or holds another checkpoint.
        OSError: a file could not be written; the previous pack stays.

    Example:
        >>> folder = save_pack(pack(model, {"leases": leases, "patents": patents}), "law")
        >>> (folder / "adamix_pack.json").is_file()
        True
    """
    state = pack_of(model)
    with state.lock:
        if not state.entries:
            raise ValueError("model: got an empty pack, expected one with a name at least")
        folder = make_folder(directory)
        owner = adamix_state(model)
        layers: dict[str, Any] = {path: model.get_submodule(path) for path in owner.paths}
        packed = {path: heads.packed_parts(model.get_submodule(path)) for path in owner.saved}
        with one_writer(folder), contextlib.ExitStack() as stack:
            if (folder / CHECKPOINT_NAME).exists():
                raise ValueError(
                    f"directory: got {str(directory)!r}, which holds {CHECKPOINT_NAME}, expected another folder"
                )
            stack.callback(remove_unnamed, folder / PACK_NAME, _STEM)
            values = {
                "version": _VERSION,
                "package_version": __version__,
                "base_model": base_facts(model, folder),
                "capacity": state.capacity,
                "layers": {path: dataclasses.asdict(Shape.of(layer)) for path, layer in layers.items()},
                "heads": {
                    path: {n: part.out_features for n, part in parts.items() if isinstance(part, heads.PackedLinear)}
                    for path, parts in packed.items()
                },
                DIGESTS: digests(state.tokenizer),
                "names": {
                    name: {**_write_name(model, entry, folder, False), "run": _run(model, entry, folder)}
                    for name, entry in state.entries.items()
                },
            }
            runs, left = old_runs(folder), left_over(folder, PACK_NAME, state.tokenizer)
            with staged(folder, PACK_NAME) as place:
                write_files(place, state.tokenizer)
                write_sealed_json(place / PACK_NAME, values)
            remove_runs(runs)
            _remove(left)
    return folder


def load_pack(
    model: nn.Module,
    directory: Folder,
    *,
    names: Sequence[str] | None = None,
    revision: str | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Puts a saved pack into `model`, its bare base, and returns it: the same names, values and room.

    Args:
        directory: of save_pack or `adamix pack`, or "user/repo" on the Hub. revision: of the repository.
        names: these alone, with room for as many; the files of the others are not opened. None: all.
        backend: as in adapt(). adamix_kernels.load(directory) finds the base model, too.

    Raises ValueError: a file is missing or damaged, the pack has no such name, or `model` is another base; nothing is
        changed then.

    Example:
        >>> import copy
        >>> bare = copy.deepcopy(model)
        >>> folder = save_pack(pack(model, {"leases": leases, "patents": patents}), "law")
        >>> list(load_pack(bare, folder).adamix.pack.entries)
        ['leases', 'patents']
    """
    check_model(model)
    check_request(backend)
    check_bare(model)
    folder = resolve_folder(directory, revision, "directory")
    values = read_pack(folder)
    sources = []
    for name in wanted_names(names, list(values["names"])):
        with called(check_name(name)):
            source = read_adamix(name, folder, values["names"][name])
            check_source(model, source)
            source.run = run_of_name(name, values["names"][name], folder)
        sources.append(source)
    try:
        shapes = {
            path: Shape(**{**facts, "offsets": tuple(facts["offsets"])}) for path, facts in values["layers"].items()
        }
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder / PACK_NAME}: got layers that are none of a pack ({error})") from error
    capacity = values["capacity"] if names is None else len(sources)
    return assemble(model, sources, shapes, capacity, backend, rows=values["heads"])


def read_pack(folder: Path) -> dict[str, Any]:
    """The JSON of a pack. Raises ValueError, naming the file, for any other or a damaged one."""
    return read_versioned(folder / PACK_NAME, "a folder written by save_pack", "a pack", (_VERSION,))


def _write_name(model: nn.Module, entry: Entry, folder: Path, alone: bool) -> dict[str, Any]:
    """Writes a name's tensors; returns the header of its checkpoint. alone: with one rank for all."""
    owner = adamix_state(model)
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in owner.paths if path in entry.ranks}
    most = max(entry.ranks.values())
    parts = {path: slots.read(layer, entry.slot, entry.ranks[path]) for path, layer in layers.items()}
    if alone:
        parts = {path: _to_rank(part, most) for path, part in parts.items()}
    tensors = {f"{path}.{key}": value for path, part in parts.items() for key, value in _tensors(part).items()}
    for path in entry.heads:
        head = heads.read_head(model.get_submodule(path), entry.slot)
        tensors |= {f"{path}.{key}": value for key, value in head.items()}
    facts = {path: _facts(layer.base, parts[path]) for path, layer in layers.items()}
    file, digest = write_safetensors_by_digest(folder, _STEM, tensors)
    return {
        "version": CHECKPOINT_VERSION,
        "package_version": __version__,
        "config": _config(parts, facts, most, list(entry.heads)).to_dict(),
        "merged": isinstance(next(iter(parts.values())), AdapterPart),
        "base_model": _with_labels(base_facts(model, folder), entry),
        "layers": facts,
        "saved_modules": list(entry.heads),
        "trainable": sorted(name for name in tensors if not name.endswith("_score")),
        **({} if entry.centroid is None else {"centroid": entry.centroid.to_json()}),
        "tensors": {"file": file.name, "bytes": file.stat().st_size, "sha256": digest},
    }


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _run(model: nn.Module, entry: Entry, folder: Path) -> dict[str, Any] | None:
    return None if entry.run is None else run_to_json(of_model(entry.run, model), folder)


def _to_rank(part: Part, rank: int) -> Part:
    shape = Shape(isinstance(part, AdapterPart), rank)
    made = slots.padded(shape, part)
    if isinstance(part, AdapterPart):
        return AdapterPart(made[0], made[1], made[2], made[3], part.activation)
    return LoraPart(made[0], made[1], part.offsets, part.out_features)


def _tensors(part: Part) -> dict[str, torch.Tensor]:
    score = torch.zeros(1)
    if isinstance(part, AdapterPart):
        names = ("down_weight", "down_bias", "up_weight", "up_bias")
        banks = {f"adapter.{n}": t.unsqueeze(0) for n, t in zip(names, part.tensors(), strict=True)}
        return {**banks, "adapter.down_score": score, "adapter.up_score": score}
    return {
        "lora_a": part.lora_a.unsqueeze(0), "lora_b": part.lora_b.unsqueeze(0), "a_score": score, "b_score": score
    }  # fmt: skip


def _facts(base: nn.Module, part: Part) -> dict[str, Any]:
    """What models.header.structure says of the layer."""
    inputs, outputs, transposed = linear_sizes(base)
    facts: dict[str, Any] = {"in_features": inputs, "out_features": outputs, "fan_in_fan_out": transposed}
    if isinstance(part, AdapterPart):
        own: dict[str, Any] = {"bottleneck": part.rank, "num_experts": 1, "share": None, "activation": part.activation}
    else:
        own = {"r": part.rank, "alpha": float(part.rank), "num_experts": 1, "share": None}
        own["output_offsets"] = list(part.offsets)
    return {**facts, **own}


def _config(parts: dict[str, Part], facts: dict[str, Any], rank: int, saved: list[str]) -> AdaMixConfig:
    one = next(iter(parts.values()))
    options: dict[str, Any] = {"num_experts": 1, "share": None, "consistency_weight": 0.0}
    if isinstance(one, AdapterPart):
        options |= {"method": "adapter", "bottleneck": rank, "activation": one.activation}
    else:
        options |= {"method": "lora", "r": rank, "alpha": float(rank), "qkv": _slices(parts, facts)}
    return AdaMixConfig(target_modules=list(parts), modules_to_save=saved, **options)


def _slices(parts: dict[str, Part], facts: dict[str, Any]) -> tuple[str, ...] | None:
    """Which of q, k, v the LoRA of fused layers is on; None where it is on all columns as one."""
    for path, part in parts.items():
        columns = facts[path]["out_features"]
        if isinstance(part, LoraPart) and part.width != columns:
            return tuple(QKV[offset // (columns // len(QKV))] for offset in part.offsets)
    return None


def _with_labels(base: dict[str, Any], entry: Entry) -> dict[str, Any]:
    """The base model's facts with the labels of this name in its configuration."""
    config = base.get("config")
    if entry.labels is None or config is None or not entry.heads:
        return base
    names = {str(number): name for number, name in enumerate(entry.labels)}
    config = {key: value for key, value in config.items() if key != "num_labels"}
    config |= {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
    config["problem_type"] = entry.problem
    return {**base, "config": config}
