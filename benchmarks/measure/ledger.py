"""The rows of a run, on disk as they come: what crashes or hangs is recorded, and the rest goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import record
from .record import Row, row

logger = logging.getLogger(__name__)

# How an item ended; each item has exactly one such row, value 1, its reason in the note.
OUTCOMES = ("timed", "checked", "refused", "absent", "failed")


class BrokenDeviceError(RuntimeError):
    """The GPU no longer answers this process (a kernel wrote out of bounds, say): another process must go on."""


class AbsentError(RuntimeError):
    """A contender cannot run here; the message says why."""


class RefusedError(RuntimeError):
    """A contender disagrees with float64, so it is not timed; the message has the figures."""


@dataclass(frozen=True)
class Item:
    """One contender at one size: the columns that its rows share."""

    op: str
    backend: str
    shape: str
    dtype: str

    def row(self, metric: str, unit: str, value: float, note: str = "", *, op: str | None = None) -> Row:
        return row(op or self.op, self.backend, self.shape, self.dtype, metric, unit, value, note)

    def __str__(self) -> str:
        return f"{self.op} {self.backend} {self.shape} {self.dtype}"


class Ledger:
    """Rows in memory and, if `path` is given, on disk after every item.

    path: CSV to write. resume: go on after what a process before this one wrote there; the item that it
    did not come back from is recorded as failed. deadline: seconds by time.monotonic() after which no
    item is begun any more.
    """

    def __init__(self, path: str | os.PathLike | None = None, *, resume: bool = False, deadline: float | None = None):
        self.path = None if path is None else Path(path)
        self.deadline = deadline
        self.rows: list[Row] = []
        self._done: set[Item] = set()
        if resume and self.path is not None:
            self._resume()

    def add(self, rows: list[Row]) -> None:
        """Keeps rows and writes the file."""
        self.rows += rows
        self._done |= {Item(r.op, r.backend, r.shape, r.dtype) for r in rows if r.metric in OUTCOMES}
        if self.path is not None:
            record.write(self.path, self.rows)

    def outcome(self, item: Item, outcome: str, note: str = "") -> None:
        """Closes an item."""
        if outcome != "timed" and outcome != "checked":
            logger.warning("%s: %s: %s", item, outcome, note)
        self.add([item.row(outcome, "", 1, _one_line(note))])

    @contextlib.contextmanager
    def item(self, item: Item, done: str = "timed") -> Iterator[list[Row] | None]:
        """Yields the list for the item's rows, or None where there is nothing to do: done before, or out of time.

        AbsentError, ImportError, RefusedError and any other error inside close the item with that outcome;
        BrokenDeviceError is recorded and raised again.
        """
        if item in self._done:
            yield None
            return
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.outcome(item, "absent", "the time for this benchmark was used up")
            yield None
            return
        self._mark(item)
        rows: list[Row] = []
        outcome, note = done, ""
        try:
            yield rows
        except (AbsentError, ImportError) as error:
            outcome, note = "absent", str(error)
        except RefusedError as error:
            outcome, note = "refused", str(error)
        except BrokenDeviceError as error:
            self.rows += rows
            self.outcome(item, "failed", str(error))
            self._mark(None)
            raise
        except Exception as error:
            logger.info("%s", item, exc_info=True)
            outcome, note = "failed", describe(error)
        self.rows += rows
        self.outcome(item, outcome, note)
        self._mark(None)

    @property
    def _marker(self) -> Path:
        return self.path.with_name(self.path.name + ".now")

    def _mark(self, item: Item | None) -> None:
        if self.path is None:
            return
        if item is None:
            self._marker.unlink(missing_ok=True)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._marker.write_text(json.dumps(vars(item)), encoding="utf-8")

    def _resume(self) -> None:
        if self.path.exists():
            self.add(record.read(self.path))
        if self._marker.exists():
            lost = Item(**json.loads(self._marker.read_text(encoding="utf-8")))
            self.outcome(lost, "failed", "the process died, or hung and was ended, in this item")
            self._mark(None)


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
    return _one_line(f"{type(error).__name__}: {str(error).strip()}")


def _one_line(text: str, limit: int = 300) -> str:
    return text.strip().partition("\n")[0][:limit]
