"""Threads, forked data workers, and processes that die."""

from __future__ import annotations

from collections.abc import Iterator

from ..record import Figure
from . import ranks, threads, workers

TITLE = "Concurrency: two threads, forked DataLoader workers, the death of a DDP rank"


def run(size: str) -> Iterator[Figure]:
    yield from threads.figures(2 if size == "small" else 20)
    yield from workers.figures()
    yield from ranks.figures(every=size == "full")
