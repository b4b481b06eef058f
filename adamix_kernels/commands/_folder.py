"""A folder of a run, written by one training at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

from ..recipes.processes import agree, is_main, join

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


@contextlib.contextmanager
def alone_in(folder: str, use_cpu: bool = False) -> Iterator[None]:
    """Within the context no other training writes to `folder`, which is made where it is not there.

    Of several processes the first one asks, and all raise. The lock is the folder's own: it leaves no file, and ends
    with the process. Where the system has none, or the file system takes none, trainings are not kept apart.

    Raises ValueError: another training is writing to it.
    """
    made = is_main() and not os.path.isdir(folder)
    with contextlib.ExitStack() as stack:
        join(use_cpu)
        if agree(is_main() and not _locked(folder, stack)):
            raise ValueError(
                f"out: got {folder!r}, to which another training is writing, expected another folder, or to wait"
            )
        try:
            yield
        finally:
            if made:  # nothing was written
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


def _locked(folder: str, stack: contextlib.ExitStack) -> bool:
    os.makedirs(folder, exist_ok=True)
    if fcntl is None:
        return True
    handle = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
