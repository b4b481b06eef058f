"""The parts, in the order of the report. A part is a module with a TITLE and `run(size)`, which yields its figures.

size: "full" is what the report shows (minutes to an hour), "small" what python_tests runs (seconds, fixed seeds).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Protocol

from .record import Figure

PARTS = (
    "fuzz_reference",
    "fuzz_triton",
    "fuzz_cuda",
    "bad_input",
    "checkpoints",
    "training",
    "concurrency",
    "numerics",
    "memory",
    "supply_chain",
    "static_checks",
)
SIZES = ("full", "small")


class Part(Protocol):
    TITLE: str

    def run(self, size: str) -> Iterator[Figure]: ...


def load(name: str) -> Part:
    """Raises ValueError for a name that is no part."""
    if name not in PARTS:
        raise ValueError(f"part: got {name!r}, expected one of {', '.join(PARTS)}")
    return importlib.import_module(f".{name}", __package__)
