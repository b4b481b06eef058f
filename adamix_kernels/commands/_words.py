"""What needs no library: options out of a file, and the nearest name to a mistyped one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What other commands, and transformers' examples, call it.
_ELSEWHERE = {
    "data": "file", "dataset_name": "data", "file": "data", "model_name_or_path": "model", "output_dir": "out",
    "train_file": "data",
}  # fmt: skip


def closest(name: str, known: Iterable[str], dashes: str = "") -> str:
    """ "; the closest is NAME", or nothing where no known name is like it."""
    names = sorted(set(known))
    found = [other for other in (_ELSEWHERE.get(name),) if other in names]
    found += difflib.get_close_matches(name, names, 1, 0.6)
    return f"; the closest is {dashes}{found[0]}" if found else ""


def read_options(path: str) -> dict[str, Any]:
    """The object of a JSON or YAML file. Raises ValueError for another kind of content, naming the file."""
    text = _read(path)
    try:
        values = json.loads(text) if path.endswith(".json") else _yaml(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.endswith(".json") else "YAML"
        raise ValueError(f"{path}: got a file that is not {kind} ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}, expected an object of options")
    return values


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, expected a JSON or YAML file of options") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8, expected a JSON or YAML file") from error


def _yaml(text: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
