"""A folder of a run, written by one training at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Within the context no other training writes to `folder`, which is made where it is not there.

    The lock is the folder's own: it leaves no file, and ends with the process. Where the system has none, or the file
    system takes none, trainings are not kept apart.

    Raises ValueError: another training is writing to it.
    """
    os.makedirs(folder, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"out: got {folder!r}, to which another training is writing, expected another folder, or to wait"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
