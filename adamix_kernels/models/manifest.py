"""adamix_files.json: which files a training checkpoint consists of, written when all of them are there."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from ._files import read_versioned, sha256, write_sealed_json
from .header import CHECKPOINT_NAME, UNSEALED_VERSION, read_header

logger = logging.getLogger(__name__)

MANIFEST_NAME = "adamix_files.json"
_VERSION = 1
_FOLDER = re.compile(r"checkpoint-(\d+)")


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """Writes name, size and SHA-256 of every file below `folder`."""
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    write_sealed_json(folder / MANIFEST_NAME, {"version": _VERSION, "files": files})


def remove_manifest(folder: str | os.PathLike[str]) -> None:
    """Before anything in `folder` is replaced."""
    (Path(folder) / MANIFEST_NAME).unlink(missing_ok=True)


def check_manifest(folder: str | os.PathLike[str]) -> None:
    """Raises ValueError, naming the folder or the file, for a training checkpoint that is not whole.

    A checkpoint of a release that wrote no manifest is taken as it is.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    header = read_header(folder / CHECKPOINT_NAME)
    if not path.is_file():
        if header["version"] == UNSEALED_VERSION:
            return
        raise ValueError(
            f"{folder}: got no {MANIFEST_NAME}, which is written last, expected a finished training checkpoint; the "
            "save was interrupted"
        )
    for name, facts in read_versioned(path, "a manifest", "a list of files", (_VERSION,))["files"].items():
        _check_file(folder / name, facts)


def newest_whole_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The checkpoint-N in `folder` with the highest N that check_manifest accepts; the others are warned of."""
    numbered = {int(m.group(1)): p for p in Path(folder).glob("checkpoint-*") if (m := _FOLDER.fullmatch(p.name))}
    for number in sorted(numbered, reverse=True):
        try:
            check_manifest(numbered[number])
        except ValueError as error:
            logger.warning("%s is passed over: %s", numbered[number], error)
        else:
            return str(numbered[number])
    return None


def first_save_was_cut(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` has checkpoint-N, and no save of one came to its end: nothing was trained that could be kept."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _FOLDER.fullmatch(path.name)]
    return bool(found) and not any((path / MANIFEST_NAME).exists() for path in found)


def _check_file(path: Path, facts: dict[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != facts["bytes"]:
        found = "no such file" if size is None else f"{size} bytes"
        raise ValueError(f"{path}: got {found}, expected {facts['bytes']} bytes; the checkpoint is not whole")
    digest = sha256(path)
    if digest != facts["sha256"]:
        raise ValueError(f"{path}: got SHA-256 {digest}, expected {facts['sha256']}; the file is corrupt")
