"""What a name needs beside its tensors: the values of its run, and its pack's tokenizer as files."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.run_values import RUN_NAME, read_run_values, run_folder, run_from_json

TOKENIZER_NAME = "tokenizer_config.json"
_RUNS = "names"  # of a pack of an older release: a folder a name, with its run file
_RUN = "run"
_TOKENIZERS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*", "tekken.json", "bpe.codes", "dict.txt", "*.spm", "*.model", "*.bpe", "*.tiktoken",
)  # fmt: skip


def run_of_folder(folder: Path) -> dict[str, Any] | None:
    """The values of the run that a folder is of; None for none. Raises ValueError for a damaged file."""
    place = run_folder(folder)
    return None if place is None else read_run_values(place)


def run_of_name(name: str, header: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The same of a name of the pack in `folder`, whose `header` holds it."""
    if _RUN in header:
        stored = header[_RUN]
        return None if stored is None else run_from_json(stored, folder)
    place = folder / _RUNS / name
    return read_run_values(place) if (place / RUN_NAME).is_file() else None


def remove_old_runs(folder: Path) -> None:
    """Removes the run files of a pack of an older release, which the JSON of the pack holds now."""
    for file in folder.glob(f"{_RUNS}/*/{RUN_NAME}"):
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is there
            file.parent.rmdir()
            file.parent.parent.rmdir()


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer of a folder, by name; empty where it has none."""
    if not (folder / TOKENIZER_NAME).is_file():
        return {}
    found = {path for pattern in _TOKENIZERS for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(found)}


def write_files(place: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
