"""The intervals that the sentences of docs/evidence name: each is one of a table, with the mean said just before it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .tables import MARK

CELL = re.compile(r"([+-]\d+\.\d) \(([+-]\d+\.\d) to ([+-]\d+\.\d)\)")
SAID = re.compile(r"([+-]\d+\.\d)\s+to\s+([+-]\d+\.\d)")
NUMBER = re.compile(r"\d+\.\d+")
BEFORE = 90  # characters in which the mean stands


def unbacked(text: str, pages: Sequence[str]) -> list[str]:
    """What `text` says outside tables, "2.4 (+1.5 to +3.3)", where no table of `pages` has that difference.

    A difference may be said the other way round: -2.4 (-3.3 to -1.5) backs it too.
    """
    known = {found for page in pages for table in MARK.finditer(page) for found in map(_key, CELL.findall(table[3]))}
    known |= {(mean, -high, -low) for mean, low, high in known}
    prose, missing = MARK.sub("", text), []
    for found in SAID.finditer(prose):
        means = NUMBER.findall(prose[max(0, found.start() - BEFORE) : found.start()])
        if not means or _key((means[-1], *found.groups())) not in known:
            missing.append(" ".join(f"{means[-1] if means else 'no mean'} ({found[0]})".split()))
    return missing


def _key(difference: tuple[str, ...]) -> tuple[float, ...]:
    """(size of the mean, low, high)"""
    mean, low, high = map(float, difference)
    return abs(mean), low, high
