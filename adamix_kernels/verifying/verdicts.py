"""What was found out, kept in the user's cache folder: one JSON file for each key.

A file is written beside its place and then put there, so that no reader sees half of one. What cannot be read, is
about something else or cannot be written costs one warning, and the verification is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

from .machine import Job, Machine

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

FORMAT = 1
RIGHT, WRONG, CRASHED, UNKNOWN = "right", "wrong", "crashed", "unknown"
_FINAL = (RIGHT, WRONG, CRASHED)
# Between two looks at a lock that another process holds.
_LOOK = 0.05
_warned: set[str] = set()


@dataclass(frozen=True)
class Verdict:
    """What this machine has shown of a job.

    state: "right"; "wrong" (other results than it must give); "crashed" (it raised, ended its process or never came
    back); "unknown" (not verified here, or it could not be). why: in words. when: UTC. cases: that were run.
    """

    op: str
    backend: str
    dtype: str
    shape: str
    gpu: str
    state: str
    why: str = ""
    when: str = ""
    seconds: float = 0.0
    cases: int = 0

    @property
    def job(self) -> Job:
        return Job(self.op, self.backend, self.dtype, self.shape)


def verdict(job: Job, machine: Machine, state: str, why: str = "", seconds: float = 0.0, cases: int = 0) -> Verdict:
    """One that was reached now."""
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Verdict(*job, machine.name, state, why, when, round(seconds, 3), cases)


def cache_folder() -> Path:
    """ADAMIX_CACHE, or adamix_kernels in the user's folder for caches."""
    named = os.environ.get("ADAMIX_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "adamix_kernels"


class Store:
    """The verdicts in a folder."""

    def __init__(self, folder: Path | None = None):
        self.folder = (cache_folder() if folder is None else folder) / "verdicts"

    def path(self, key: dict[str, str]) -> Path:
        """Where the verdict of a key lies."""
        return self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]}.json"

    def read(self, job: Job, machine: Machine) -> Verdict | None:
        """The verdict of a job here, if there is a final one."""
        found = self.read_record(machine.key(job))
        if found is None:
            return None
        try:
            made = Verdict(**found["verdict"])
            if made.job == job and made.state in _FINAL and all(isinstance(t, str) for t in (made.why, made.when)):
                return made
        except (KeyError, TypeError):
            pass
        self._not_ours(self.path(machine.key(job)), "it is no verdict of this kind")
        return None

    def write(self, verdict: Verdict, machine: Machine) -> None:
        """Keeps a final verdict; an unknown one is nothing to keep."""
        if verdict.state in _FINAL:
            self.write_record(machine.key(verdict.job), {"verdict": asdict(verdict)})

    def read_record(self, key: dict[str, str]) -> dict[str, Any] | None:
        """What was written for this very key, or None."""
        path = self.path(key)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            self._not_ours(path, f"it cannot be read ({error})")
            return None
        if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("key") != key:
            self._not_ours(path, "it is about something else")
            return None
        return found

    def write_record(self, key: dict[str, str], record: dict[str, Any]) -> None:
        """Puts a file in its place at once, or warns."""
        path = self.path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, made = tempfile.mkstemp(dir=self.folder, prefix=".new-", suffix=".json")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump({"format": FORMAT, "key": key, **record}, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(made, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(made)
                raise
        except OSError as error:
            _warn(f"{self.folder}: a verdict cannot be kept there ({error}): every process reaches it anew")

    @contextlib.contextmanager
    def lock(self, deadline: float) -> Iterator[bool]:
        """Holds the folder's lock; gives False where another process held it until `deadline` (time.monotonic).

        Where there is no folder to lock, or no lock to be had in it, everybody works alone.
        """
        handle = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            pass
        try:
            yield handle is None or fcntl is None or _locked(handle, deadline)
        finally:
            if handle is not None:
                os.close(handle)

    def _not_ours(self, path: Path, why: str) -> None:
        _warn(f"{path}: the verdict kept there is not used: {why}")


def known(store: Store, wanted: list[Job], machine: Machine) -> dict[Job, Verdict]:
    """The final verdicts among those of `wanted`."""
    found = ((job, store.read(job, machine)) for job in wanted)
    return {job: verdict for job, verdict in found if verdict is not None}


def unknown(job: Job, machine: Machine, why: str) -> Verdict:
    """A job that nothing is known about."""
    return replace(verdict(job, machine, UNKNOWN, why), when="")


def _locked(handle: int, deadline: float) -> bool:
    assert fcntl is not None
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK)
        except OSError:  # a file system without locks
            return True


def _warn(words: str) -> None:
    """Once a process for each folder."""
    folder = words.partition(":")[0].rpartition("verdicts")[0]
    if folder not in _warned:
        _warned.add(folder)
        warnings.warn(words, RuntimeWarning, stacklevel=2)
