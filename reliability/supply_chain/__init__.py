"""What is installed, imported, written and shipped: versions, network, pickles, wheels."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from adamix_kernels import _build

from ..record import Figure
from . import offline, pickles, versions, wheels

TITLE = "Supply chain"
ROOT = Path(__file__).parents[2]


def run(size: str) -> Iterator[Figure]:
    """size "full" also runs `make oldest`, and builds a wheel with the C++/CUDA library.

    That needs nvcc; without one the figure says so and does not pass.
    """
    yield from _versions()
    if size == "full":
        yield _oldest()
    yield _offline()
    yield from _pickles()
    yield _wheel("pure Python wheel", {"ADAMIX_CUDA": "0"})
    if size == "full":
        yield _wheel("wheel with the library for sm_90", {"ADAMIX_CUDA": "1", "ADAMIX_ARCHITECTURES": "90"})
    yield _pip_check()


def _versions() -> Iterator[Figure]:
    bounds = versions.lower_bounds()
    wrong = versions.not_the_bound(bounds, versions.pins(versions.OLDEST))
    about = "requirements/oldest.txt, lower bounds pinned"
    yield Figure(about, _found(f"{len(bounds) - len(wrong)} of {len(bounds)}", wrong), "all", not wrong)
    lock = versions.OLDEST.with_name("dev.lock").read_text(encoding="utf-8")
    wrong = [*versions.outside(lock), *versions.without_hash(lock), *versions.places(lock)]
    number = len(versions.pins_of(lock))
    value = _found(f"{number} packages", wrong)
    yield Figure("requirements/dev.lock: in bounds, every file hashed, no host and no path", value, "all", not wrong)


def _oldest() -> Figure:
    start = time.monotonic()
    done = subprocess.run(["make", "-s", "oldest"], cwd=ROOT, capture_output=True, text=True)
    value = next((line for line in reversed(done.stdout.splitlines()) if " passed" in line), f"exit {done.returncode}")
    about = "tests on the lowest versions (torch 2.6.0, transformers 4.57.1, ...), installation included"
    return Figure(about, value.partition(" in ")[0], "0 failed", done.returncode == 0, time.monotonic() - start)


def _offline() -> Figure:
    start = time.monotonic()
    imported, asked, unavailable = offline.import_all("adamix_kernels")
    value = _found(f"{imported} modules, {len(asked)} tries", [*asked, *unavailable])
    passed = imported > 0 and not asked and all("triton" in why for why in unavailable)
    return Figure("every module imported where no network is", value, "0 tries", passed, time.monotonic() - start)


def _pickles() -> Iterator[Figure]:
    calls = pickles.calls_in(ROOT / "adamix_kernels")
    more = sorted(set(calls) - set(pickles.ALLOWED))
    about = "calls in the package that write pickles, beyond the files that other libraries read"
    yield Figure(about, _found(f"{len(more)} of {len(calls)}", more), "0", not more)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files, pickled, ours = pickles.written_by_everything(Path(folder))
    value = _found(f"{len(files)} files, {len(pickled)} pickled", [*pickled, *ours])
    about = "save, merge, export_peft: files written"
    yield Figure(about, value, "0 pickled", bool(files) and not pickled and not ours, time.monotonic() - start)


def _wheel(about: str, variables: dict[str, str]) -> Figure:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel = wheels.build(ROOT, Path(folder), variables)
        except _build.BuildError as error:
            return Figure(about, f"not built: {str(error).splitlines()[0]}", "built", False)
        wrong = [*wheels.machine_paths(wheel, Path(folder)), *wheels.unexpected(wheel, ROOT)]
        number = len(wheels.names(wheel))
    about += ": the package's files, csrc/ and metadata alone, no path of the machine that built it"
    return Figure(about, _found(f"{number} files", wrong), "0 wrong", not wrong, time.monotonic() - start)


def _pip_check() -> Figure:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    return Figure("pip check", lines[0], "No broken requirements found.", done.returncode == 0)


def _found(value: str, wrong: list[str]) -> str:
    return value if not wrong else f"{value}; {', '.join(wrong[:5])}"
