"""Data sets that the package `datasets` loads: those of the hub, and folders in its layout."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._extras import install_line
from ..models.hub import hub_answers, unreached
from ._sources import Parts
from ._table import Table, listed

_SPLITS = {
    "dev": ("validation", "validation_matched", "dev", "valid", "val"),
    "test": ("test", "test_matched"),
}
_LONGEST = 600  # characters of another package's error


def hub_parts(source: str) -> Parts:
    """A hub data set, its configuration after a colon ("nyu-mll/glue:rte").

    Raises:
        ValueError: the hub cannot give it, with all its reasons; or it has no train split.
        ModuleNotFoundError: `datasets` is not installed.
    """
    return _parts(source, hub_splits(source))


def hub_splits(source: str) -> Any:
    """What load_dataset gives for a hub name. Raises as hub_parts."""
    name, _, config = source.partition(":")
    library = _datasets(source)
    reached = hub_answers(name, "data", "dataset")
    try:
        with _said_once(), contextlib.nullcontext() if reached else _from_its_cache(library):
            return library.load_dataset(name, config or None)
    except Exception as error:
        if not reached and isinstance(error, OSError):
            raise ValueError(
                f"data: {source!r} is neither a file nor a folder here, nor a data set that datasets has in its cache "
                f"of this machine, and {unreached()}"
            ) from error
        raise ValueError(
            f"data: {source!r} is neither a file nor a folder here, and as a hub data set datasets.load_dataset "
            f"refused it: {reasons(error)}"
        ) from error


def folder_parts(folder: Path) -> Parts:
    """A folder of save_to_disk, or one that load_dataset understands (shards, data/, a README with its layout)."""
    library = _datasets(str(folder))
    path = str(folder.resolve())  # load_dataset takes a bare "csv" or "json" for one of its builders
    try:
        loaded = library.load_from_disk(path) if is_saved(folder) else library.load_dataset(path)
    except Exception as error:
        raise ValueError(
            f"data: {folder} has no training file (train.tsv, .csv, .jsonl, .json, .parquet), and datasets refused it: "
            f"{reasons(error)}"
        ) from error
    return _parts(str(folder), loaded if isinstance(loaded, dict) else {"train": loaded})


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote a folder: of several splits, or of one set."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def reasons(error: BaseException) -> str:
    """What an error says, and below it what caused it: other packages raise a general one from the real one."""
    said: list[str] = []
    current: BaseException | None = error
    while current is not None:
        text = " ".join(str(current).split())
        if text and not any(text in before for before in said):
            said.append(f"{type(current).__name__}: {text}")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    shown = said if len(said) < 3 else [said[0], said[-1]]
    return "; because of ".join(s if len(s) <= _LONGEST else s[:_LONGEST] + " ..." for s in shown)


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """Of what the Hub's client warns of at each of its tries, the first: it goes on for half a minute."""
    source, said = logging.getLogger("huggingface_hub.utils._http"), set[str]()

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        known = text in said or text.startswith("Retrying in")
        said.add(text)
        return not known

    source.addFilter(keep)
    try:
        yield
    finally:
        source.removeFilter(keep)


@contextlib.contextmanager
def _from_its_cache(library: Any) -> Iterator[None]:
    """Within it `datasets` asks the Hub nothing, as with HF_HUB_OFFLINE."""
    previous, library.config.HF_HUB_OFFLINE = library.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        library.config.HF_HUB_OFFLINE = previous


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data: {source!r} needs the package datasets: {install_line('train')}. Without it, a file or a folder "
            "with train.tsv, train.csv or train.jsonl can be read"
        ) from error
    return datasets


def _parts(source: str, loaded: Any) -> Parts:
    if "train" not in loaded:
        raise ValueError(f"data: {source!r} has the splits {listed(sorted(loaded))}, expected train among them")
    tables: dict[str, Any] = {"train": _table(source, "train", loaded["train"])}
    notes = []
    for part, names in _SPLITS.items():
        split = next((name for name in names if name in loaded), None)
        tables[part] = None if split is None else _table(source, split, loaded[split])
        if split is not None and split.endswith("_matched"):
            notes.append(f"The {part} split is {split}.")
    return Parts(**tables, notes=notes)


def _table(source: str, split: str, rows: Any) -> Table:
    found = {name: getattr(feature, "names", None) for name, feature in rows.features.items()}
    label_names = {name: list(names) for name, names in found.items() if names}
    return Table(
        f"{source}, split {split}",
        "row",
        list(rows.column_names),
        range(1, len(rows) + 1),
        lambda column: list(rows[column]),
        label_names,
    )
