"""Folders of either kind, read and held against the model that they are for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..models.header import CHECKPOINT_NAME, PACK_NAME, check_base, check_class, check_pooling, other_weights
from ..models.hub import resolve_folder
from . import heads, slots
from .beside import run_of_folder
from .peft_folder import CONFIG_NAME, read_peft
from .sources import Source, read_adamix

Folder = str | os.PathLike[str]


def read_source(model: nn.Module, name: str, folder: Folder) -> Source:
    """What is in `folder`, checked against `model`. Raises ValueError that begins with the name."""
    with called(name):
        place = one_adaptation(folder)
        if (place / CHECKPOINT_NAME).is_file():
            source = read_adamix(name, place)
        elif (place / CONFIG_NAME).is_file():
            source = read_peft(name, place, model)
        else:
            raise ValueError(
                f"folder: got {str(folder)!r}, which holds neither {CHECKPOINT_NAME} nor {CONFIG_NAME}, expected a "
                "folder of save_adamix, of adamix train or of a PEFT LoRA"
            )
        check_source(model, source)
        if source.header is not None:  # PEFT trains a copy, whatever the module is tied to
            for path in source.heads:
                heads.check_untied(model, path)
        source.run = run_of_folder(place)
    return source


def one_adaptation(folder: Folder) -> Path:
    """Where it is on this disk. Raises ValueError for no such folder, and for that of a pack."""
    place = resolve_folder(folder, name="folder")
    if (place / PACK_NAME).is_file() and not (place / CHECKPOINT_NAME).is_file():
        raise ValueError(
            f"folder: got {str(folder)!r}, a pack of several, expected one adaptation: in Python "
            "unpack(model, name, folder) takes a name out of a pack"
        )
    return place


def check_source(model: nn.Module, source: Source) -> None:
    """Raises ValueError where `model` is another base than the source's, or lacks a layer of it."""
    if source.header is not None:
        check_base(model, source.header)
        check_class(model, source.header)
        different = other_weights(model, source.header)
        if different is not None:
            raise ValueError(different)
        if getattr(model, "adamix", None) is None:
            check_pooling(model, source.header)
    slots.check_layers(model, source)
    for path in source.heads:
        try:
            model.get_submodule(path)
        except AttributeError as error:
            kind = (source.header or {}).get("base_model", {}).get("class")
            raise ValueError(
                f"{path}: got a {type(model).__name__} without such a module, expected "
                f"{kind or 'the model with the head'} that the folder was trained with"
            ) from error


class called:
    """Errors about a folder begin with its name in the pack."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{self.name}: {error}") from error


def wanted_names(names: Sequence[str] | None, known: list[str]) -> list[str]:
    """Each once, in the pack's order."""
    if names is None:
        return known
    if isinstance(names, str) or not names:
        raise ValueError(f"names: got {names!r}, expected some of {', '.join(known)} in a list, or None for all")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"names: got {unknown[0]!r}, expected some of {', '.join(known)}")
    return [name for name in known if name in names]
