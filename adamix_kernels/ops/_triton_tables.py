"""Block sizes of the Triton kernels: shipped tables per architecture and shape class, never an autotune.

A shape class is (bytes of an element, columns of the narrow tile). A missing class takes the next wider
one of the nearest older architecture, so every shape on every GPU has one deterministic answer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import NamedTuple

from .._environment import triton_table


class Config(NamedTuple):
    """rows: tokens a tile; cols: features a step of the inner loops."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int


# {capability: {(bytes of an element, widest narrow tile): Config}}
Table = Mapping[int, Mapping[tuple[int, int], Config]]


# Answers so far, each with its shipped table, which so keeps its id.
_KNOWN: dict[tuple[str, int, int, int, int, str | None], tuple[Table, Config]] = {}


@functools.cache
def _sizes(key: str) -> tuple[int, int]:
    first, second = (int(n) for n in key.split("x"))
    return first, second


@functools.cache
def measured(path: str | None) -> dict[str, dict[int, dict[tuple[int, int], Config]]]:
    """Tables that `adamix bench tune` wrote: {kernel: {"90": {"2x16": [rows, cols, num_warps, num_stages]}}}.

    "about", beside the kernels, says where the table comes from. A path is read once in a process.
    """
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        raw = json.load(file)
    return {
        kernel: {
            int(arch): {_sizes(key): Config(*row) for key, row in classes.items()} for arch, classes in table.items()
        }
        for kernel, table in raw.items()
        if kernel != "about"
    }


def tuned(kernel: str, capability: int, itemsize: int, width: int) -> Config | None:
    """What the table named by ADAMIX_TRITON_TABLE has for that architecture and class."""
    return measured(triton_table()).get(kernel, {}).get(capability, {}).get((itemsize, width))


def lookup(kernel: str, shipped: Table, capability: int, itemsize: int, width: int) -> Config:
    """The configuration of `kernel` for a narrow tile of `width` columns.

    capability: 10 * major + minor, 0 under the interpreter. A table named by ADAMIX_TRITON_TABLE goes
    first where it has the architecture and the class.
    """
    path = triton_table()
    key = kernel, id(shipped), capability, itemsize, width, path
    known = _KNOWN.get(key)
    if known is None:
        chosen = tuned(kernel, capability, itemsize, width) or _shipped(shipped, capability, itemsize, width)
        known = _KNOWN[key] = shipped, chosen
    return known[1]


def _shipped(table: Table, capability: int, itemsize: int, width: int) -> Config:
    arch = max((a for a in table if a <= capability), default=min(table))
    classes = sorted(limit for size, limit in table[arch] if size == itemsize)
    return table[arch][itemsize, next((limit for limit in classes if width <= limit), classes[-1])]
