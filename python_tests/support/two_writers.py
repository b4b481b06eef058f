"""A second writer of a folder, which must wait for the first."""

import os
import threading
import time

import pytest


def write_while_locked(folder, caplog, write, *arguments):
    """Runs write(*arguments) in a thread while another handle holds the folder's lock: it waits, says so and changes
    nothing; once the lock is gone it ends."""
    fcntl = pytest.importorskip("fcntl")
    before = sorted(path.name for path in folder.iterdir())
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # another process that is writing
        writer = threading.Thread(target=write, args=arguments)
        writer.start()
        deadline = time.monotonic() + 60
        while "waiting" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert writer.is_alive()
        assert f"{folder}: waiting for another process that is writing to it" in caplog.text
        assert sorted(path.name for path in folder.iterdir()) == before
    finally:
        os.close(handle)
    writer.join(60)
    assert not writer.is_alive()
