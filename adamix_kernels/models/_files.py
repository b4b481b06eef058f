"""Files that exist whole or not at all, and JSON that knows when it was damaged."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .._extras import needed

logger = logging.getLogger(__name__)
fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_CHUNK = 1 << 20  # bytes
_SEAL = "sha256"
_KEPT: set[tuple[int, int]] = set()  # device and number of the folders that this process keeps for itself
_TEMPORARY = re.compile(r"\.adamix\.(\d+)\.(?:\d+\.)?tmp")


def as_path(name: str, value: object) -> Path:
    """Raises TypeError, naming the argument, for what is no path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a path")
    return Path(value)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Raises ValueError when `path` is there and is not a folder, or a link to nothing."""
    path = as_path("directory", path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"directory: got {str(path)!r}, which is a file, expected a folder or a new name")
    if path.is_symlink() and not path.exists():
        raise ValueError(f"directory: got {str(path)!r}, a link that leads nowhere, expected a folder or a new name")
    path.mkdir(parents=True, exist_ok=True)
    return path


def keep_folder(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Keeps `folder`, until `stack` ends, for this process alone, which is then its one_writer whenever it asks; False
    where another has it. The lock is the folder's own: it leaves no file, and ends with the process."""
    if fcntl is None:
        return True
    handle = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, handle)
    if not lock(handle):
        return False
    _KEPT.add(_number(handle))
    stack.callback(_KEPT.discard, _number(handle))
    return True


def lock(handle: int) -> bool:
    """Locks an open file or folder until it is closed; False where another has it. True where nothing can be locked."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
    return True


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Waits until no other process or thread is in one for `folder`: each would remove the other's files that no JSON
    names yet. Where the system has no locks, or the file system takes none, nobody waits."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            if _number(handle) not in _KEPT:
                with contextlib.suppress(OSError):
                    _wait_for(handle, folder, fcntl)
                    # Closing alone would leave it locked while a process that was forked meanwhile lives.
                    stack.callback(fcntl.flock, handle, fcntl.LOCK_UN)
        yield


def _wait_for(handle: int, folder: Path, locks: ModuleType) -> None:
    try:
        locks.flock(handle, locks.LOCK_EX | locks.LOCK_NB)
    except BlockingIOError:
        logger.warning("%s: waiting for another process that is writing to it", folder)
        locks.flock(handle, locks.LOCK_EX)


def _number(handle: int) -> tuple[int, int]:
    found = os.fstat(handle)
    return found.st_dev, found.st_ino


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary) in the same folder, flushed to the disk, then renamed to `path` in one step."""
    _replace(path.parent, write, lambda _temporary: path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_sealed_json(path: Path, values: dict[str, Any]) -> None:
    """write_json of `values` and, as their last entry, the SHA-256 of their canonical JSON."""
    write_json(path, sealed(values))


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with their own SHA-256 under "sha256", which unsealed() checks."""
    return {**values, _SEAL: _digest_of(values)}


def unsealed(values: dict[str, Any], where: object) -> dict[str, Any]:
    """What was given to sealed(). Raises ValueError, naming `where`, when a value is not what it was."""
    rest = {name: value for name, value in values.items() if name != _SEAL}
    digest = _digest_of(rest)
    if values.get(_SEAL) != digest:
        raise ValueError(f"{where}: got SHA-256 {digest}, expected {values.get(_SEAL)!r}; it is corrupt, or was edited")
    return rest


def read_json(path: Path, kind: str) -> Any:
    """Raises ValueError, naming the file and the `kind` of content that was wanted, for what is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: got a file that is not JSON ({error}), expected {kind}") from error


def read_versioned(
    path: Path, writer: str, kind: str, versions: tuple[int, ...], bare: int | None = None
) -> dict[str, Any]:
    """A sealed JSON with a "version", without its seal; one of version `bare` has none.

    Raises ValueError, naming the file, for any other or a damaged one. writer: what writes it. kind: what it holds.
    """
    if not path.is_file():
        raise ValueError(f"{path}: got no such file, expected {writer}")
    values = read_json(path, kind)
    version = values.get("version") if isinstance(values, dict) else None
    if version not in versions:
        wanted = ", ".join(map(str, versions)) + (", the one" if len(versions) == 1 else ", those")
        raise ValueError(f"{path}: got version {version!r}, expected {wanted} this release reads")
    rest = values if version == bare else unsealed(values, path)
    return rest


def _digest_of(values: dict[str, Any]) -> str:
    as_read = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    replace_file(path, lambda temporary: _save_tensors(temporary, tensors))


def write_safetensors_by_digest(folder: Path, stem: str, tensors: dict[str, torch.Tensor]) -> tuple[Path, str]:
    """Writes `<stem>-<start of the SHA-256>.safetensors`; returns its path and the whole digest."""
    digest = ""

    def name(temporary: Path) -> Path:
        nonlocal digest
        digest = sha256(temporary)
        return folder / f"{stem}-{digest[:16]}.safetensors"

    return _replace(folder, lambda temporary: _save_tensors(temporary, tensors), name), digest


def write_pickled_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """torch.save of tensors alone. Through memory: torch's own writer has no OSError for a full disk."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    replace_file(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def remove_temporaries(folder: Path) -> None:
    """Removes what killed processes of this machine left unfinished in `folder`."""
    for path in folder.glob(".adamix.*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is not None and not _alive(int(found.group(1))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove_unnamed(path: Path, stem: str) -> None:
    """Removes the tensor files that the JSON at `path` does not name, and what killed processes left beside it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"names": {}}
        headers = values["names"].values() if "names" in values else [values]
        wanted = {header["tensors"]["file"] for header in headers}
        for file in path.parent.glob(f"{stem}-*.safetensors"):
            if file.name not in wanted:
                file.unlink(missing_ok=True)
        remove_temporaries(path.parent)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process, or no such question on this system
        return True
    return True


def _temporary(folder: Path) -> Path:
    return folder / f".adamix.{os.getpid()}.{threading.get_ident()}.tmp"


def remove_leftover(temporary: Path) -> None:
    """Of a process that was ended, and had this one's number: in a container all have the same."""
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)


def _replace(folder: Path, write: Callable[[Path], object], name: Callable[[Path], Path]) -> Path:
    temporary = _temporary(folder)
    remove_leftover(temporary)
    try:
        temporary.touch()  # with the permissions of any new file; safetensors 0.8 gives its files to the owner alone
        mode = stat.S_IMODE(temporary.stat().st_mode)
        with naming(folder, temporary):
            write(temporary)
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        _flush(temporary)
        path = name(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can open a folder
        _flush(folder)
    return path


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with needed("saving"):
        from safetensors import SafetensorError
        from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except SafetensorError as error:  # which a full disk is, too
        raise _os_error(error, path, errno.EIO) from error


def _os_error(error: Exception, path: Path, otherwise: int) -> OSError:
    """What a library written in Rust says of an error of the system, with its number, as an OSError about `path`."""
    number = re.search(r"(?:os error|Os \{ code:) (\d+)", str(error))  # the second is safetensors 0.5's
    return OSError(int(number.group(1)) if number else otherwise, str(error), str(path))


@contextlib.contextmanager
def naming(path: Path, hidden: Path) -> Iterator[None]:
    """An OSError that tells no file, as that of a write, or one of `hidden`, a temporary one, tells `path`."""
    try:
        yield
    except OSError as error:
        told = error.filename is not None and not str(error.filename).startswith(str(hidden))
        if error.errno is None or told:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
