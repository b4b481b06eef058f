"""Where the parts of a data set are: in this package, in a file, in a folder, or where `datasets` finds them."""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._rows import SUFFIXES
from ._table import Table, listed, read_table

EMBEDDED = "remarks"
# A file's name without its suffix; GLUE's archive has the names after the first ones.
PARTS = {
    "train": ("train", "training", "in_domain_train", "msr_paraphrase_train"),
    "dev": ("dev", "validation", "valid", "val", "dev_matched", "validation_matched", "in_domain_dev"),
    "test": ("test", "test_matched", "msr_paraphrase_test"),
}
_UNREAD = ("out_of_domain_dev", "dev_mismatched", "validation_mismatched")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True)
class Parts:
    """train, and what there is of the others."""

    train: Table
    dev: Table | None = None
    test: Table | None = None
    notes: list[str] = field(default_factory=list)


def is_file(source: str) -> bool:
    """Whether a source is one file, which has no parts."""
    return source != EMBEDDED and Path(source).expanduser().is_file()


def find_parts(source: str) -> Parts:
    """Reads every part of a source; see load_task. Raises what load_task raises for files and names."""
    if source == EMBEDDED:
        folder = importlib.resources.files(__package__) / "data"
        return Parts(read_table(folder / f"{EMBEDDED}_train.tsv"), read_table(folder / f"{EMBEDDED}_dev.tsv"))
    path = Path(source).expanduser()
    if is_file(source):
        return _noted(Parts(read_table(path)))
    if path.is_dir():
        return _folder(path)
    # A hub name is "name" or "owner/name"; asking the hub for a mistyped path would take it half a minute.
    if source.startswith((".", "/", "~", "\\")) or source.count("/") > 1 or path.suffix.lower() in SUFFIXES:
        raise FileNotFoundError(f"data: {source!r}: no such folder or file")
    from ._library import hub_parts

    return hub_parts(source)


def part_files(folder: Path) -> dict[str, Path | None]:
    """The file of each part by its name. Raises ValueError where two could be meant."""
    found: dict[str, Path | None] = {}
    for part, stems in PARTS.items():
        files = [
            path
            for path in sorted(folder.iterdir())
            if path.is_file() and path.stem.lower() in stems and path.suffix.lower() in SUFFIXES
        ]
        if len(files) > 1:
            raise ValueError(
                f"data: {folder} has {listed([path.name for path in files])} for the {part} part, expected one; move "
                "the others away, or name a single file"
            )
        found[part] = files[0] if files else None
    return found


def _folder(folder: Path) -> Parts:
    files = part_files(folder)
    if files["train"] is None:
        return _other_folder(folder, files)
    tables: dict[str, Any] = {part: read_table(path) for part, path in files.items() if path is not None}
    found = _noted(Parts(**tables))
    if files["dev"] is not None and files["dev"].stem not in PARTS["dev"][:4]:
        found.notes.append(f"The dev split is {files['dev'].name}.")
    unread = sorted(path.name for path in folder.iterdir() if path.stem.lower() in _UNREAD)
    if unread:
        found.notes.append(f"Not read: {', '.join(unread)}.")
    return found


def _other_folder(folder: Path, files: dict[str, Path | None]) -> Parts:
    """A folder without a training file of ours: saved or laid out by `datasets`, or a mistake."""
    from ._library import folder_parts, is_saved

    if is_saved(folder):
        return folder_parts(folder)
    inside = sorted(path.name for path in folder.iterdir())
    data = [name for name in inside if Path(name).suffix.lower() in SUFFIXES]
    sharded = any(_SHARD.search(name) for name in data) or (folder / "data").is_dir()
    if any(files.values()) or (data and not sharded) or not inside:
        beside = f"; it has {listed(data[:6])}" if data else ""
        raise FileNotFoundError(
            f"data: {folder} has no training file, expected train{SUFFIXES[0]} (or {', '.join(SUFFIXES[1:])}){beside}; "
            "rename it, or name the file itself in place of the folder"
        )
    return folder_parts(folder)


def _noted(parts: Parts) -> Parts:
    for table in (parts.train, parts.dev, parts.test):
        if table is not None and table.left_out:
            count, first = len(table.left_out), table.left_out[0]
            parts.notes.append(
                f"{table.name}: {count} cut row{'s are' if count > 1 else ' is'} left out, the first in line {first}."
            )
    return parts
