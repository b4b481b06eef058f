"""Printing where nobody may read any more: `adamix train ... | head`."""

from __future__ import annotations

import contextlib
import errno
import io
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
        except OSError as error:
            if not is_closed_pipe(error):
                raise
            with contextlib.suppress(io.UnsupportedOperation):  # a stream of Python's own
                to_nowhere(self._stream)
            if not self._gone:
                self._gone = True
                self._told()


def is_closed_pipe(error: OSError) -> bool:
    """Whether a write found no reader, which Windows calls an invalid argument."""
    windows = os.name == "nt" and error.errno == errno.EINVAL and error.filename is None
    return windows or isinstance(error, BrokenPipeError)


def to_nowhere(stream: Any) -> None:
    """What the stream still holds goes there, too; or Python's own flush at the end would fail."""
    number = stream.fileno()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def let_go(stream: Any) -> None:
    """Drops what the stream holds where it cannot be written: Python would try once more at its end, print that, and
    end with a status of its own."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):  # closed
        with contextlib.suppress(io.UnsupportedOperation, ValueError):  # a stream of Python's own
            to_nowhere(stream)


@contextlib.contextmanager
def outlives_its_reader(name: str) -> Iterator[None]:
    """Within the context what is printed may find no reader: the work goes on, and stderr says so."""
    out, errors = sys.stdout, sys.stderr
    if out is None or errors is None:  # `>&-`: print() knows
        yield
        return
    loud = Pipe(errors, lambda: None)
    plain = Pipe(out, lambda: loud.write(f"{name}: nobody reads its output any more; it goes on\n"))
    sys.stdout, sys.stderr = plain, loud
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, errors
        try:
            plain.flush()
        finally:
            loud.flush()
