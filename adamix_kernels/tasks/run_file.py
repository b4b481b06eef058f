"""adamix_run.json: which encoder and data a saved checkpoint belongs to, so that it can be used by its folder alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..models._files import write_json
from ..models.run_values import RUN_NAME as RUN_NAME
from ..models.run_values import read_run_values, sealed_run

TASKS = ("classification", "regression", "generation")
_KINDS = {"model": str, "data": str, "label_names": list, "max_tokens": int, "pooling": str, "generation": dict}
_KINDS["task_names"] = list
_NEWER = ("task_column", "task_names")


@dataclass(frozen=True)
class Run:
    """What a training was about.

    Attributes:
        model, data: as given to resolve_model and load_task. A folder or file of this disk is written as its name and
            the way to it from the run's folder: both may move together.
        label_names: in id order; empty for a regression and for generation.
        max_tokens: texts were cut there.
        pooling: "model" or "mean", what the head really reads; see load_classifier.
        task: "classification", "regression" or "generation".
        text_column, text_pair_column, label_column: those of the data that were used; None: unknown (older runs).
        generation: how texts are written (max_new_tokens, beams, ...); empty for the other tasks.
        dev_fraction: the share of the training rows that became dev, where the data has no dev part.
        task_column, task_names: of gates by task, which column tells a row's task, and its names in id order.
    """

    model: str
    data: str
    label_names: list[str]
    max_tokens: int
    pooling: str = "model"
    task: str = "classification"
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    dev_fraction: float = 0.1
    task_column: str | None = None
    task_names: list[str] = field(default_factory=list)


def run_values(run: Run) -> dict[str, Any]:
    """As read_run_values gives them. An older release reads a file that does not need the newer fields."""
    return {name: value for name, value in asdict(run).items() if value or name not in _NEWER}


def write_run(folder: str | os.PathLike[str], run: Run) -> None:
    """Writes the file into an existing folder in one step, with a digest of itself."""
    folder = Path(folder)
    write_json(folder / RUN_NAME, sealed_run(run_values(run), folder))


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Raises ValueError, naming the file, when it is missing, malformed, damaged or of another version."""
    path = Path(folder) / RUN_NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a folder written by adamix train or the demo")
    return run_of(read_run_values(Path(folder)), path)


def run_of(values: Mapping[str, Any], path: object) -> Run:
    """The run of such values. Raises ValueError, naming `path`, where they are none."""
    try:
        run = Run(**values)
        for name, kind in _KINDS.items():
            if not isinstance(getattr(run, name), kind):
                raise ValueError(f"{name} = {getattr(run, name)!r}, expected a JSON {kind.__name__}")
        if run.task not in TASKS:
            raise ValueError(f"task {run.task!r}, expected one of {', '.join(map(repr, TASKS))}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a run file of this release: {error}") from error
    return run
