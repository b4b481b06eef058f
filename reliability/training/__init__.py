"""kill -9 and resume, numbers that are not finite, skipped steps of a GradScaler."""

from __future__ import annotations

from collections.abc import Iterator

from ..record import Figure
from . import kills, nans, scaling

TITLE = "Training faults: kill -9 and resume, NaN, overflow under GradScaler"
_SIZES = {"small": {"kills": 3, "runs": 1}, "full": {"kills": 12, "runs": 4}}


def run(size: str) -> Iterator[Figure]:
    counts = _SIZES[size]
    yield from kills.figures(counts["runs"], counts["kills"])
    yield from nans.figures()
    yield from scaling.figures()
