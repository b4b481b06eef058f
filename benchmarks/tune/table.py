"""A table of block sizes as ops/_triton_tables.py reads it: its classes, its file, and one entry for a trial."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from adamix_kernels.ops._triton_tables import Config

from ..measure import record

VARIABLE = "ADAMIX_TRITON_TABLE"


class ShapeClass(NamedTuple):
    """What a table's row is for: a kernel, bytes of an element, columns of the narrow tile."""

    kernel: str
    itemsize: int
    width: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.itemsize}x{self.width}"


# {(class): chosen block sizes} of one GPU.
Chosen = dict[ShapeClass, Config]


def table(chosen: Chosen, capability: int) -> dict[str, dict[str, dict[str, list[int]]]]:
    """What ops/_triton_tables.py reads: {kernel: {"90": {"2x16": [rows, cols, num_warps, num_stages]}}}."""
    made: dict = {}
    for (kernel, itemsize, width), config in sorted(chosen.items()):
        made.setdefault(kernel, {}).setdefault(str(capability), {})[f"{itemsize}x{width}"] = list(config)
    return made


def write(path: str | os.PathLike, chosen: Chosen, capability: int, about: dict[str, str]) -> None:
    """Writes the table and, under "about", where it comes from; whole or not at all, an older file is replaced."""
    record.write_text(path, json.dumps({"about": about, **table(chosen, capability)}, indent=1) + "\n")


@contextlib.contextmanager
def installed(shape: ShapeClass, config: Config, capability: int) -> Iterator[None]:
    """Meanwhile the kernel takes `config` for that class, by the door a user's table comes in."""
    before = os.environ.get(VARIABLE)
    with tempfile.TemporaryDirectory(prefix="adamix-tune-") as folder:
        # The tables are cached by their path: every candidate needs another.
        path = os.path.join(folder, "table.json")
        write(path, {shape: config}, capability, {})
        os.environ[VARIABLE] = path
        try:
            yield
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before
