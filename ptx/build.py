"""Compiles engine/ with g++; what did not change is not compiled again."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_ENGINE = Path(__file__).parent / "engine"
_FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fPIC"]


class EngineError(RuntimeError):
    """The executor cannot be compiled here; the message says why."""


def problem() -> str | None:
    """Why PTX cannot be executed on this machine, or None."""
    if shutil.which("g++") is None:
        return "the PTX executor needs g++ 12 or newer"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the PTX executor needs the package triton, which compiles the kernels"
    return None


@functools.cache
def engine() -> ctypes.CDLL:
    """The compiled executor, in PTX_BUILD or build/ptx. Raises EngineError, with the compiler's words."""
    folder = Path(os.environ.get("PTX_BUILD") or Path(__file__).parent.parent / "build" / "ptx")
    folder.mkdir(parents=True, exist_ok=True)
    shared = _digest([*sorted(_ENGINE.glob("*.h"))], _machine())
    sources = sorted(_ENGINE.glob("*.cpp"))
    objects = [folder / f"{source.stem}-{_digest([source], shared)}.o" for source in sources]
    library = folder / f"engine-{_digest([], ''.join(path.name for path in objects))}.so"
    if not library.exists():
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda pair: _compile(["-c", str(pair[0])], pair[1]), zip(sources, objects)))
        _compile(["-shared", *map(str, objects)], library)
    loaded = ctypes.CDLL(str(library))
    loaded.ptx_load.restype = ctypes.c_void_p
    return loaded


def _digest(files: list[Path], more: str) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in files) + more.encode()).hexdigest()[:16]


def _machine() -> str:
    """What -march=native depends on, besides the flags."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return " ".join([*_FLAGS, platform.machine(), able])


def _compile(arguments: list[str], out: Path) -> None:
    if out.exists():
        return
    mine = out.with_suffix(f".{os.getpid()}")
    try:
        done = subprocess.run(["g++", *_FLAGS, *arguments, "-o", str(mine)], capture_output=True, text=True)
    except OSError as error:
        raise EngineError(f"g++: {error}; the PTX executor needs g++ 12 or newer") from error
    if done.returncode:
        raise EngineError(f"g++ could not compile the PTX executor:\n{done.stderr}")
    mine.replace(out)
