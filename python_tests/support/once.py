"""What is dear to make, once for all of pytest-xdist's processes: the first that asks makes it, the others wait."""

import os
import shutil

from filelock import FileLock


def once(tmp_path_factory, name, make):
    """The folder that make(folder) filled, in one process of this run; a failed one is made anew by the next."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
