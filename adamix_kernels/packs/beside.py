"""What a name needs beside its tensors: the values of its run, as its folder or its pack tells them."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..models.header import PACK_NAME
from ..models.run_values import RUN_NAME, read_run_values, run_folder, run_from_json

logger = logging.getLogger(__name__)
_RUNS = "names"  # of a pack of an older release: a folder a name, with its run file
_RUN = "run"


def run_of_folder(folder: Path) -> dict[str, Any] | None:
    """The values of the run that a folder is of; None for none. They only describe: of a damaged file there are none,
    and a warning says so."""
    place = run_folder(folder)
    return None if place is None else _described(place)


def run_of_name(name: str, header: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The same of a name of the pack in `folder`, whose `header` holds it."""
    if _RUN not in header:
        place = folder / _RUNS / name
        return _described(place) if (place / RUN_NAME).is_file() else None
    stored = header[_RUN]
    try:
        return None if stored is None else run_from_json(stored, folder)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        logger.warning("%s, %s: not a run of this release: %s: it is not looked at", folder / PACK_NAME, name, error)
        return None


def _described(place: Path) -> dict[str, Any] | None:
    try:
        return read_run_values(place)
    except ValueError as error:
        logger.warning("%s: it is not looked at", error)
        return None


def json_of(path: Path) -> dict[str, Any]:
    """What a file of ours says, before another one takes its place; empty where it is not there, or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def old_runs(folder: Path) -> list[Path]:
    """The run files of a pack of an older release in `folder`, which the JSON that replaces its own will hold: those of
    its names that stand alone in their folder."""
    names = json_of(folder / PACK_NAME).get("names")
    headers = names.items() if isinstance(names, dict) else ()
    old = [
        name for name, header in headers if isinstance(header, dict) and _RUN not in header and Path(name).name == name
    ]
    files = [folder / _RUNS / name / RUN_NAME for name in old]
    return [file for file in files if file.is_file() and len(list(file.parent.iterdir())) == 1]


def remove_runs(files: Iterable[Path]) -> None:
    """Removes what old_runs found, and the folders that are empty then."""
    for file in files:
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is there
            file.parent.rmdir()
            file.parent.parent.rmdir()
