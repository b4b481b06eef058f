"""A temporary folder that a process does not leave behind when it is asked to end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A new folder, removed at the end, by an exception too, and by a SIGTERM that nobody else waits for: the process
    ends by that signal all the same, as do the processes of multiprocessing that it started."""
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        owner = os.getpid()

        def end(number: int, _frame: Any) -> None:
            signal.signal(number, signal.SIG_DFL)
            if os.getpid() == owner:  # and not one that was forked meanwhile
                for child in multiprocessing.active_children():  # which would go on writing
                    child.terminate()
                    child.join(1)
                shutil.rmtree(name, ignore_errors=True)
            os.kill(os.getpid(), number)

        ours = threading.current_thread() is threading.main_thread()
        ours = ours and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if ours:
            signal.signal(signal.SIGTERM, end)
        try:
            yield Path(name)
        finally:
            if ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
