"""From sources to a shared object: what is to be compiled, what was before, and files that are put in place whole.

Objects are named by contents, not dated as those of ninja: a fresh clone, a changed option, another branch find them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .toolchain import BuildError, run

PACKAGE = Path(__file__).resolve().parent.parent
# Of csrc/: what becomes a module of its own, for one torch and one Python.
NODE_FOLDER = "autograd"


@dataclass(frozen=True)
class Compiled:
    """A source, the object file it becomes, and the command that makes it, less `-o FILE`."""

    source: Path
    object: Path
    command: tuple[str, ...] = ()

    @property
    def log_file(self) -> Path:
        return self.object.with_suffix(".log")

    @property
    def log(self) -> str:
        """What the compiler printed."""
        return self.log_file.read_text(errors="replace")


def source_folder() -> Path:
    """csrc/ of this installation or of this checkout; BuildError where there is none."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"no folder csrc in {PACKAGE} or beside it")


def sources(csrc: Path, *, host: bool = False) -> list[Path]:
    """The files of the library, those of device code first, as they take longest. host: with those of csrc/host/."""
    found = [path for pattern in ("*/*.cu", "*.cpp", "*/*.cpp") for path in sorted(csrc.glob(pattern))]
    others = {NODE_FOLDER} if host else {NODE_FOLDER, "host"}
    found = [path for path in found if path.parent.name not in others]
    if not found:
        raise BuildError(f"{csrc} holds no .cu and no .cpp file")
    return found


def with_includes(source: Path, csrc: Path, *, host: bool = False) -> list[Path]:
    """`source` and every file of csrc/ that it includes by name in quotes, directly or not; of host/ if `host`."""
    found = [source]
    for path in found:
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            places = [Path(os.path.normpath(folder / name)) for folder in (path.parent, csrc)]
            included = next((place for place in places if place.is_file()), None)
            if included is not None and included not in found and (host or included.parent.name != "host"):
                found.append(included)
    return found


def fingerprint(files: Sequence[Path], *words: str) -> str:
    """Of the files' contents and of the words, in 16 hexadecimal digits; the order of the files does not matter."""
    digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in set(files))
    return hashlib.sha256("\0".join([*digests, *words]).encode()).hexdigest()[:16]


def planned(
    compiler: Sequence[str],
    flags: Sequence[str],
    source: Path,
    read: Sequence[Path],
    folder: Path,
    versions: Sequence[str],
) -> Compiled:
    """The object in `folder` that `compiler flags source` makes, named by the contents of all that goes into it.

    read: `source` and what it includes. versions: of what else may change (the compiler, torch). Options in
    `compiler` make no difference to the object.
    """
    name = f"{stem(source)}{fingerprint(read, compiler[0], *flags, *versions)}.o"
    return Compiled(source, folder / name, (*compiler, *flags, str(source)))


def stem(source: Path) -> str:
    """How the names of a source's objects begin."""
    return f"{source.parent.name}-{source.name}-"


def link(linker: Sequence[str], objects: Sequence[Compiled], libraries: Sequence[str], output: Path) -> None:
    """Links the objects; `output` is put in place whole, or stays what it was."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as part:
        run(*linker, *(compiled.object for compiled in objects), *libraries, "-o", part)


@contextlib.contextmanager
def objects_folder(csrc: Path, name: str) -> Iterator[Path]:
    """Where objects are kept: build/csrc/<name> of a checkout, for one process at a time; nowhere when installed."""
    if csrc.parent == PACKAGE:
        with tempfile.TemporaryDirectory(prefix="adamix-build-") as temporary:
            yield Path(temporary)
        return
    with locked(csrc.parent / "build" / "csrc" / name) as folder:
        yield folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """`folder`, made where it is not there, for one process at a time."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`: takes its place when the block ends well, vanishes otherwise."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o755 if path.suffix == ".so" else 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
