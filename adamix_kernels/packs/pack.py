"""pack, add_expert, replace_expert, remove_expert: names of a pack, put into slots of fixed banks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from .._backends import check_request
from ..models.config import AdaMixConfig
from ..models.guards import install_guards
from ..models.inject import check_bare
from ..models.pooling import pooling_of, set_pooling
from ..models.state import AdaMixState, adamix_state, check_model, replace_module
from ..models.tying import tied_outside
from ..ops._checks import check_positive
from . import heads, slots
from .reading import Folder, called, read_source
from .slots import RoutedLayer, Shape
from .sources import Source, classifies
from .state import Entry, Pack, PackRouter, check_name, pack_of
from .words import check_words, tokenizer_files

MOST = 256


def pack(
    model: nn.Module,
    folders: Mapping[str, Folder],
    *,
    capacity: int | None = None,
    max_rank: int = 1,
    max_labels: int = 1,
    backend: str = "auto",
) -> nn.Module:
    """Puts several adaptations, trained apart, into `model`, one slot each, and returns it.

    After it `with use_experts(model, ["leases", "patents", ...])` says whose adapters and whose head serve which sample
    of a batch, in one forward; each sample's result is that of its adaptation alone. Memory: the base once, and in
    every adapted layer `capacity` slots as large as the largest adapter there; smaller ranks are padded with zeros. A
    layer that a name did not adapt serves it as the base. Everything is frozen.

    Args:
        model: the bare base model, with a head where the folders have heads. Its own head serves names without one.
        folders: name -> a folder of save_adamix or `adamix train` (adapters or LoRA, merged or not; experts that are
            not merged are averaged, as their own model does in evaluation), a folder of a PEFT LoRA, or "user/repo" on
            the Hub. 1 to 256 of them.
        capacity: slots, at least as many as folders; more make room for add_expert.
        max_rank: ranks that every slot has room for at least. max_labels: likewise, labels of the head.
        backend: as in adapt().

    Where names have fewer labels than others, the logits of the columns they lack are -inf: their probability is 0.
    model.adamix.pack.entries holds each name's slot and labels.

    Example:
        >>> model = pack(base, {"leases": "runs/leases", "patents": "runs/patents"})  # doctest: +SKIP
        >>> with use_experts(model, ["patents", "leases"]):  # doctest: +SKIP
        ...     logits = model(**batch).logits

    Raises:
        TypeError, ValueError: an argument is no such thing; a folder is missing, damaged, of another base model or of
            something that a pack cannot hold; two of them do not go together. The message begins with the folder's
            name, and nothing is changed then.
    """
    check_model(model)
    check_request(backend)
    check_bare(model)
    if not isinstance(folders, Mapping):
        raise TypeError(f"folders: got {type(folders).__name__}, expected a mapping of names to folders")
    wanted = len(folders) if capacity is None else capacity
    if not 1 <= len(folders) <= MOST:
        raise ValueError(f"folders: got {len(folders)}, expected 1 to {MOST}")
    check_positive(capacity=wanted, max_rank=max_rank, max_labels=max_labels)
    if not len(folders) <= wanted <= MOST:
        raise ValueError(f"capacity: got {wanted} for {len(folders)} folders, expected {len(folders)} to {MOST}")
    sources = [read_source(model, check_name(name), folder) for name, folder in folders.items()]
    order = [path for path, _ in model.named_modules()]
    shapes = slots.shapes_for(sources, order, max_rank)
    return assemble(model, sources, shapes, wanted, backend, max_labels=max_labels)


def assemble(
    model: nn.Module,
    sources: Sequence[Source],
    shapes: Mapping[str, Shape],
    capacity: int,
    backend: str,
    *,
    max_labels: int = 1,
    rows: Mapping[str, Mapping[str, int]] | None = None,
) -> nn.Module:
    """pack() of sources that fit `model`. rows: of the heads' linear layers, by path and by name in it."""
    router = PackRouter()
    router.exact = classifies(type(model).__name__)
    pooling = _pooling(model, sources)
    layers = slots.build(model, shapes, capacity, router, backend)
    packed, own = _heads(model, sources, capacity, router, max_labels, rows or {})
    state = Pack(router, capacity, {}, own, {path: tied_outside(model, path) for path in packed})
    state.tokenizer = _words(model, sources)
    for slot, source in enumerate(sources):
        with called(source.name):
            entry, pairs = _planned(layers, packed, own, slot, source)
        _commit(pairs)
        state.entries[source.name] = entry

    # Nothing of the model was changed so far, and nothing is refused from here on.
    if pooling is not None:
        set_pooling(model, pooling)
    model.requires_grad_(False)
    for path, layer in layers.items():
        replace_module(model, path, layer.train(model.training))
    for path, head in packed.items():
        replace_module(model, path, head)
    heads.widen(model, packed)
    owner: Any = model
    owner.adamix = AdaMixState(_config(shapes, packed, capacity), router, list(layers), list(packed), pack=state)
    install_guards(model)
    return model


def add_expert(model: nn.Module, name: str, folder: Folder) -> nn.Module:
    """Puts one more adaptation into a free slot of a pack, under a new name; returns `model`.

    The banks keep their addresses and sizes: what was compiled or captured goes on. The folder is read while
    other threads go on; then it waits for their forwards that are in use_experts.

    Args:
        folder: as in pack(). It must fit the pack: the same layers or some of them, ranks and labels that it has room
            for (pack's max_rank and max_labels), a free slot (pack's capacity).

    Raises ValueError: `model` is no pack, the name is taken or is none, no slot is free, or the folder does not fit;
        the message says what to change, and nothing is changed.

    Example:
        >>> model = pack(model, {"leases": leases}, capacity=2)
        >>> model = add_expert(model, "patents", patents)
        >>> with use_experts(model, ["patents", "leases"]):
        ...     model(**batch).logits.shape
        torch.Size([2, 2])
    """
    state = pack_of(model)
    check_name(name)
    with state.lock:
        _free_slot(state, name)
    source = read_source(model, name, folder)  # forwards go on meanwhile
    checked = _check_words(model, state, source)
    with state.lock:
        _put(model, state, name, _free_slot(state, name), source, checked)
    return model


def replace_expert(model: nn.Module, name: str, folder: Folder) -> nn.Module:
    """Puts another adaptation in the place of a name's, which it must fit; see add_expert. Returns `model`.

    Raises ValueError: `model` is no pack or has no such name, or the folder does not fit; nothing is changed.

    Example:
        >>> model = pack(model, {"leases": leases})
        >>> model = replace_expert(model, "leases", patents)  # trained anew, say
    """
    state = pack_of(model)
    with state.lock:
        state.entry(name)
    source = read_source(model, name, folder)  # forwards go on meanwhile
    checked = _check_words(model, state, source)
    with state.lock:
        _put(model, state, name, state.entry(name).slot, source, checked)
    return model


def remove_expert(model: nn.Module, name: str) -> nn.Module:
    """Empties a name's slot, for another one. Returns `model`. Raises ValueError: no pack, or no such name.

    Example:
        >>> model = remove_expert(pack(model, {"leases": leases, "patents": patents}), "leases")
        >>> list(model.adamix.pack.entries)
        ['patents']
    """
    state = pack_of(model)
    with state.lock:
        slot = state.entry(name).slot
        owner = adamix_state(model)
        pairs = [pair for path in owner.paths for pair in slots.plan(_layer(model, path), slot, None)]
        pairs += [pair for path in owner.saved for pair in heads.plan_head(model.get_submodule(path), slot, {})]
        _commit(pairs)
        del state.entries[name]
    return model


def _pooling(model: nn.Module, sources: Sequence[Source]) -> str | None:
    """What the heads read; None where no folder tells. Raises ValueError, naming two that read different things."""
    here = pooling_of(model) or "model"
    by_pooling = {source.pooling or here: source.name for source in sources if source.heads}
    if len(by_pooling) > 1:
        told = " and ".join(f"{pooling!r} ({name})" for pooling, name in by_pooling.items())
        raise ValueError(f"folders: got heads that read {told}, expected the same pooling in all names of a pack")
    return next(iter(by_pooling), None) if any(source.pooling for source in sources) else None


def _words(model: nn.Module, sources: Sequence[Source]) -> dict[str, bytes]:
    """The tokenizer of the first one's folder: where that has none, all are for the base's. Raises ValueError where a
    later one has another."""
    first = sources[0].folder
    found = tokenizer_files(first)
    for source in sources[1:]:
        if source.folder != first:
            with called(source.name):
                check_words(source.name, found, tokenizer_files(source.folder), getattr(model, "config", None))
    return found


def _heads(
    model: nn.Module,
    sources: Sequence[Source],
    capacity: int,
    router: PackRouter,
    max_labels: int,
    stored: Mapping[str, Mapping[str, int]],
) -> tuple[dict[str, nn.Module], dict[str, dict[str, torch.Tensor]]]:
    """(the packed heads, the model's own ones as tensors), by path."""
    packed, own = {}, {}
    given_paths = {path for source in sources for path in source.heads}
    paths = [path for path, _ in model.named_modules() if path in given_paths]
    linears = [m for path in paths for m in model.get_submodule(path).modules() if isinstance(m, nn.Linear)]
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    for path in paths:
        head = model.get_submodule(path)
        rows = dict(stored.get(path, {}))
        for name, module in head.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            key = f"{name}.weight" if name else "weight"
            given = [source.heads[path][key] for source in sources if key in source.heads.get(path, {})]
            gives_labels = module is linears[-1] and labels in (None, module.out_features)
            room = max_labels if gives_labels else 1
            rows[name] = max(rows.get(name, 1), room, *(len(value) if value.dim() else 0 for value in given), 1)
        packed[path] = heads.packed_head(path, head, capacity, rows, router)
        own[path] = {name: value.detach().clone() for name, value in head.state_dict().items()}
    return packed, own


def _planned(
    layers: Mapping[str, RoutedLayer],
    packed: Mapping[str, nn.Module],
    own: Mapping[str, dict[str, torch.Tensor]],
    slot: int,
    source: Source,
) -> tuple[Entry, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The entry, and all that is to be written, made before anything is. Raises ValueError where it does not fit."""
    absent = sorted(set(source.layers) - set(layers)) or sorted(set(source.heads) - set(packed))
    if absent:
        raise ValueError(
            f"{absent[0]}: got a folder that changes it, expected the layers and heads of the pack alone: pack the "
            "folders together from the start"
        )
    parts = {path: Shape.of(layers[path]).fit(path, part) for path, part in source.layers.items()}
    tensors = {path: source.heads.get(path, own[path]) for path in packed}
    for path, head in packed.items():
        heads.check_head(path, head, tensors[path])
    pairs = [pair for path, layer in layers.items() for pair in slots.plan(layer, slot, parts.get(path))]
    pairs += [pair for path, head in packed.items() for pair in heads.plan_head(head, slot, tensors[path])]
    ranks = {path: part.rank for path, part in parts.items()}
    labels = _labels(source, packed, tensors)
    entry = Entry(slot, ranks, tuple(source.heads), labels, source.problem, source.centroid, source.run)
    return entry, pairs


def _labels(
    source: Source, packed: Mapping[str, nn.Module], tensors: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[str] | None:
    """As the folder tells them, or numbered, as many as the last linear layer of the heads has rows."""
    keys = [
        (path, f"{part}.weight" if part else "weight")
        for path, head in packed.items()
        for part, module in heads.packed_parts(head).items()
        if isinstance(module, heads.PackedLinear)
    ]
    if not keys:
        return source.labels
    rows = tensors[keys[-1][0]][keys[-1][1]].shape[0]
    known = source.labels is not None and len(source.labels) == rows
    return source.labels if known else [f"LABEL_{number}" for number in range(rows)]


@torch.no_grad()
def _commit(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, value in pairs:
        target.copy_(value)


def _free_slot(state: Pack, name: str) -> int:
    """Raises ValueError: the name is taken, or the pack is full."""
    if name in state.entries:
        raise ValueError(f"name: got {name!r}, which the pack has, expected a new name, or replace_expert")
    taken = {entry.slot for entry in state.entries.values()}
    free = next((slot for slot in range(state.capacity) if slot not in taken), None)
    if free is None:
        raise ValueError(
            f"name: got {name!r} for a pack that is full ({state.capacity} slots), expected remove_expert first, "
            "or a pack made with a larger capacity"
        )
    return free


def _check_words(model: nn.Module, state: Pack, source: Source) -> Mapping[str, bytes] | None:
    """The pack's tokenizer, against which that of the source is held; None where the source is to be its only name."""
    files = state.tokenizer
    if not set(state.entries) - {source.name}:
        return None
    with called(source.name):
        check_words(source.name, files, tokenizer_files(source.folder), getattr(model, "config", None))
    return files


def _put(
    model: nn.Module, state: Pack, name: str, slot: int, source: Source, checked: Mapping[str, bytes] | None
) -> None:
    """checked: what _check_words returned, which takes its time."""
    owner = adamix_state(model)
    layers = {path: _layer(model, path) for path in owner.paths}
    packed = {path: model.get_submodule(path) for path in owner.saved}
    with called(name):
        here = pooling_of(model) or "model"
        if source.heads and packed and (source.pooling or here) != here:
            raise ValueError(f"folder: got a head that reads {source.pooling!r}, expected {here!r}, as in the pack")
        entry, pairs = _planned(layers, packed, state.heads, slot, source)
        words = tokenizer_files(source.folder)
        if set(state.entries) - {name}:
            if checked is not state.tokenizer:  # another name came meanwhile
                check_words(name, state.tokenizer, words, getattr(model, "config", None))
            words = state.tokenizer
    _commit(pairs)
    state.entries[name] = entry
    state.tokenizer = words or state.tokenizer


def _layer(model: nn.Module, path: str) -> RoutedLayer:
    return cast("RoutedLayer", model.get_submodule(path))


def _config(shapes: Mapping[str, Shape], packed: Mapping[str, nn.Module], capacity: int) -> AdaMixConfig:
    rank = max(shape.rank for shape in shapes.values())
    adapters = any(shape.adapter for shape in shapes.values())
    return AdaMixConfig(
        method="adapter" if adapters else "lora",
        num_experts=capacity,
        bottleneck=rank,
        r=rank,
        alpha=float(rank),
        share=None,
        routing="sample",
        consistency_weight=0.0,
        target_modules=list(shapes),
        modules_to_save=list(packed),
    )
