"""Printing where nobody may read any more: `adamix train ... | head`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Pipe:
    """A stream that drops what is written after its reader has gone. told: called then, once."""

    def __init__(self, stream: Any, told: Callable[[], object]):
        self._stream, self._told, self._gone = stream, told, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._tried(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, call: Callable[..., object], *arguments: str) -> None:
        try:
            call(*arguments)
        except BrokenPipeError:
            # What the stream still holds goes there, too; or Python's own flush at the end would fail.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if not self._gone:
                self._gone = True
                self._told()


@contextlib.contextmanager
def outlives_its_reader(name: str) -> Iterator[None]:
    """Within the context what is printed may find no reader: the work goes on, and stderr says so."""
    out, errors = sys.stdout, sys.stderr
    loud = Pipe(errors, lambda: None)
    plain = Pipe(out, lambda: loud.write(f"{name}: nobody reads its output any more; it goes on\n"))
    sys.stdout, sys.stderr = plain, loud
    try:
        yield
    finally:
        plain.flush()
        loud.flush()
        sys.stdout, sys.stderr = out, errors
