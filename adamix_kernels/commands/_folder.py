"""A folder of a run or a pack, written by one command at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..models._files import keep_folder, make_folder
from ..recipes.processes import agree, is_main, join


@contextlib.contextmanager
def alone_in(folder: str, use_cpu: bool = False) -> Iterator[None]:
    """Within the context no other command writes to `folder`, which is made where it is not there.

    Of several processes the first one asks, and all raise. The lock is the folder's own: it leaves no file, and ends
    with the process. Where the system has none, or the file system takes none, commands are not kept apart.

    Raises ValueError: another command is writing to it.
    """
    join(use_cpu)
    with contextlib.ExitStack() as stack:
        if agree(is_main() and not _keep(folder, stack)):
            raise _taken(folder)
        yield


@contextlib.contextmanager
def kept(folder: str) -> Iterator[None]:
    """alone_in of a command that is no training, and runs on one process."""
    with contextlib.ExitStack() as stack:
        if not _keep(folder, stack):
            raise _taken(folder)
        yield


def _keep(folder: str, stack: contextlib.ExitStack) -> bool:
    made = not os.path.isdir(folder)
    if not keep_folder(make_folder(Path(folder)), stack):
        return False
    if made:
        stack.callback(_remove_empty, folder)
    return True


def _remove_empty(folder: str) -> None:
    with contextlib.suppress(OSError):  # something was written
        os.rmdir(folder)


def _taken(folder: str) -> ValueError:
    return ValueError(
        f"out: got {folder!r}, to which another command is writing, expected another folder, or to wait"
    )  # fmt: skip
