"""adamix_run.json: which encoder and data a saved checkpoint belongs to, so that it can be used by its folder alone."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ..models._files import unsealed, write_sealed_json

RUN_NAME = "adamix_run.json"
_VERSION = 2
_UNSEALED_VERSION = 1  # it holds no digest of itself


@dataclass(frozen=True)
class Run:
    """model, data: as given to resolve_model and load_task. label_names: in id order.

    pooling: see load_classifier.
    """

    model: str
    data: str
    label_names: list[str]
    max_tokens: int
    pooling: str = "model"


def write_run(folder: str | os.PathLike[str], run: Run) -> None:
    """Writes the file into an existing folder in one step, with a digest of itself."""
    write_sealed_json(Path(folder) / RUN_NAME, {"version": _VERSION, **asdict(run)})


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Raises ValueError, naming the file, when it is missing, malformed, damaged or of another version."""
    path = Path(folder) / RUN_NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a folder written by adamix train or the demo")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.get("version")
        if version not in (_UNSEALED_VERSION, _VERSION):
            raise ValueError(f"version {version!r}, expected 1 or 2")
        values = values if version == _UNSEALED_VERSION else unsealed(values, RUN_NAME)
        return Run(**{name: value for name, value in values.items() if name != "version"})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a run file of this release: {error}") from error
