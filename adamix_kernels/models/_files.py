"""Files that exist whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

_CHUNK = 1 << 20  # bytes


def make_folder(path: str | os.PathLike) -> Path:
    """Raises ValueError when `path` is there and is not a folder."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"directory: got {str(path)!r}, which is a file, expected a folder or a new name")
    path.mkdir(parents=True, exist_ok=True)
    return path


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """write(temporary) in the same folder, flushed to the disk, then renamed to `path` in one step."""
    _replace(path.parent, write, lambda _temporary: path)


def write_json(path: Path, values: dict) -> None:
    text = json.dumps(values, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    replace_file(path, lambda temporary: _save_tensors(temporary, tensors))


def write_safetensors_by_digest(folder: Path, stem: str, tensors: dict[str, torch.Tensor]) -> tuple[Path, str]:
    """Writes `<stem>-<start of the SHA-256>.safetensors`; returns its path and the whole digest."""
    digest = ""

    def name(temporary: Path) -> Path:
        nonlocal digest
        digest = sha256(temporary)
        return folder / f"{stem}-{digest[:16]}.safetensors"

    return _replace(folder, lambda temporary: _save_tensors(temporary, tensors), name), digest


def _replace(folder: Path, write: Callable[[Path], None], name: Callable[[Path], Path]) -> Path:
    temporary = folder / f".adamix.{os.getpid()}.tmp"
    try:
        write(temporary)
        _flush(temporary)
        path = name(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can open a folder
        _flush(folder)
    return path


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(ready, path, metadata={"format": "pt"})


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
