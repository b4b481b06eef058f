"""Compiles engine/ with g++, as the package's own build compiles csrc/: what did not change is not compiled again."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
from pathlib import Path

from adamix_kernels._build.objects import fingerprint, link, locked, planned, with_includes
from adamix_kernels._build.schedule import compile_all, parallel
from adamix_kernels._build.toolchain import BuildError, run

_ENGINE = Path(__file__).parent / "engine"
_FLAGS = ("-c", "-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fPIC")


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


def environment() -> dict[str, str]:
    """The variables of a process that executes PTX."""
    mine = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ENGINE.parents[1])}
    mine.pop("TRITON_INTERPRET", None)
    return mine


@functools.cache
def engine() -> ctypes.CDLL:
    """The compiled executor, in PTX_BUILD or build/ptx. Raises EngineError, with the compiler's words."""
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except BuildError as error:
        raise EngineError(f"the PTX executor needs g++ 12 or newer: {error}") from error
    loaded.ptx_load.restype = ctypes.c_void_p
    return loaded


def _compiled() -> Path:
    versions = run("g++", "-dumpfullversion").strip(), _machine()
    with locked(Path(os.environ.get("PTX_BUILD") or _ENGINE.parents[1] / "build" / "ptx")) as folder:
        objects = [
            planned(["g++"], _FLAGS, source, with_includes(source, _ENGINE), folder, versions)
            for source in sorted(_ENGINE.glob("*.cpp"))
        ]
        library = folder / f"engine-{fingerprint((), *(each.object.name for each in objects))}.so"
        if not library.exists():
            link(["g++", "-shared"], compile_all(objects, parallel()), (), library)
    return library


def _machine() -> str:
    """What -march=native depends on."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {able}"
