"""Results as JSON lines: one finished run a line, appended whole, so that a run can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..models._files import sealed, unsealed

logger = logging.getLogger(__name__)


def row_key(values: dict[str, Any]) -> str:
    """The first 16 hex digits of the SHA-256 of canonical JSON: what a run is about, without its outcome."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def append_row(path: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Appends one line in one write, flushed to the disk, with a digest; several processes may share the file.

    A line that an interrupted write left unfinished is ended first (read_rows leaves it out).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(sealed(row), sort_keys=True).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with _locked(descriptor):
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            written = os.write(descriptor, data)
            if written != len(data):
                raise OSError(f"{path}: wrote {written} of {len(data)} bytes of a row")
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every whole line, in order, without its digest; none where there is no file.

    A line that is damaged is left out with a warning. A line without a digest (an older release's) is believed.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"got a {type(row).__name__}, expected an object")
            rows.append(unsealed(row, f"line {number}") if "sha256" in row else row)
        except (ValueError, RecursionError) as error:
            logger.warning("%s, line %d: not a whole JSON object, left out (%s)", path, number, error)
    return rows


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows; one writer there
        yield
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
