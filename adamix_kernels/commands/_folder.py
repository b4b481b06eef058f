"""A folder of a run, written by one training at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..models._files import keep_folder, make_folder
from ..recipes.processes import agree, is_main, join


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
        if agree(is_main() and not keep_folder(make_folder(Path(folder)), stack)):
            raise ValueError(
                f"out: got {folder!r}, to which another training is writing, expected another folder, or to wait"
            )
        try:
            yield
        finally:
            if made:  # nothing was written
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
