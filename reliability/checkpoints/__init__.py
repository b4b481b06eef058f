"""Damaged files, malicious files, killed saves, full disks."""

from __future__ import annotations

from collections.abc import Iterator

from ..record import Figure
from . import damage, full_disk, kills, pickles

TITLE = "Checkpoints: damage, malice, kill -9 during a save, a full disk"
_SIZES = {
    "small": {"truncations": 8, "flips": 24, "kills": 4},
    "full": {"truncations": 64, "flips": 256, "kills": 60},
}


def run(size: str) -> Iterator[Figure]:
    counts = _SIZES[size]
    yield from damage.figures(counts["truncations"], counts["flips"])
    yield from pickles.figures()
    yield from kills.figures(counts["kills"])
    yield from full_disk.figures()
