"""The values of adamix_run.json, for whoever carries them from folder to folder; tasks.run_file says what they mean."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._files import sealed, unsealed
from .hub import PACKAGED, absent, with_names, with_paths

RUN_NAME = "adamix_run.json"
_VERSION = 3
_READABLE = (1, 2, 3)
_PLACES = ("model", "data")


def run_folder(folder: Path) -> Path | None:
    """Where the run file of `folder` is: in it, or, of a Trainer's checkpoint-N, by whatever link or way, beside it;
    None for none."""
    beside = [place.parent for place in (folder, folder.resolve()) if place.name.startswith("checkpoint-")]
    return next((place for place in (folder, *beside) if (place / RUN_NAME).is_file()), None)


def of_model(values: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A run's values with the place of `model`, where its base was found now, in place of one that is not there."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    found = name and (name in PACKAGED or os.path.exists(name) or absent(values.get("model") or ""))
    return {**values, "model": name} if found else dict(values)


def run_to_json(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a file in `folder` holds of a run's values, but for its seal."""
    rest = {name: value for name, value in values.items() if name not in _PLACES}
    places = with_names({name: values[name] for name in _PLACES if name in values}, folder)
    return {"version": _VERSION, **places, **rest}


def run_from_json(values: Any, folder: Path) -> dict[str, Any]:
    """What was given to run_to_json. Raises ValueError for another version, or what is none."""
    version = values.get("version") if isinstance(values, dict) else None
    if version not in _READABLE:
        raise ValueError(f"version {version!r}, expected one of {', '.join(map(str, _READABLE))}")
    rest = {name: value for name, value in values.items() if name != "version"}
    places: dict[str, Any] = {name: value for name, value in rest.items() if name.removesuffix("_path") in _PLACES}
    return {**dict(with_paths(places, folder)), **{name: v for name, v in rest.items() if name not in places}}


def read_run_values(folder: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, where it is malformed, damaged or of another version."""
    path = folder / RUN_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("version") in _READABLE[1:]:
            values = unsealed(values, RUN_NAME)
        return run_from_json(values, folder)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: not a run file of this release: {error}") from error


def sealed_run(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The whole file of `folder`."""
    return sealed(run_to_json(values, folder))
