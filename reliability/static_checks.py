"""What can be told without running the package: types, style, lengths, imports, the C++ compiler's warnings."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from adamix_kernels import _build
from adamix_kernels._build import BuildError, objects, toolchain

from .record import Figure

TITLE = "Static checks"
ROOT = Path(__file__).parent.parent
LONGEST = 400  # lines
# A longer file says why on one of its first lines, in these words.
_REASON = re.compile(r"more than 400 lines because \w+")
_FOLDERS = ("adamix_kernels", "csrc", "reliability", "benchmarks", "ptx", "python_tests", "examples")
_SOURCES = {".py", ".h", ".cpp", ".cu"}
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def run(size: str) -> Iterator[Figure]:
    """size "small" leaves out what `make lint` and the other tests do anyway: mypy, ruff, imports, nvcc."""
    if size == "full":
        yield _mypy()
        yield _tool("ruff check", "All checks passed!", "ruff", "check", ".")
        yield _tool("ruff format --check", "already formatted", "ruff", "format", "--check", ".")
        imports = "python_tests/project/test_imports.py"
        yield _tool("imports run downward (test_imports.py)", " passed", "pytest", "-q", imports)
    files = sources(ROOT)
    long = too_long(ROOT, files)
    about = f"files above {LONGEST} lines without a reason at their top"
    yield Figure(about, f"{len(long)} of {len(files)}{_names(long)}", "0", bool(files) and not long)
    yield _compiled("g++", _host)
    if size == "full":
        yield _compiled("nvcc for sm_90 and its host compiler", _cuda)


def sources(root: Path) -> list[Path]:
    found = [path for folder in _FOLDERS for path in (root / folder).rglob("*")]
    return sorted(path for path in [*found, *root.glob("*.py")] if path.suffix in _SOURCES)


def too_long(root: Path, files: Sequence[Path]) -> list[str]:
    """The files of more than LONGEST lines whose first ten do not say why."""
    found = []
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > LONGEST and not _REASON.search("\n".join(lines[:10])):
            found.append(path.relative_to(root).as_posix())
    return found


def not_strict(pyproject: str) -> list[str]:
    """The modules that a [[tool.mypy.overrides]] spares from errors; all of them where strict is not on."""
    if "\n[tool.mypy]\n" not in pyproject or "\nstrict = true\n" not in pyproject:
        return ["adamix_kernels.*"]
    blocks = pyproject.split("[[tool.mypy.overrides]]")[1:]
    spared = [block.partition("\n[")[0] for block in blocks if "ignore_errors" in block]
    return [name for block in spared for name in re.findall(r'"(adamix_kernels[\w.*]*)"', block)]


def compile_strictly(source: Path, output: Path) -> None:
    """g++ on one file of device or host code with the flags of the package. Raises BuildError."""
    flags = _build.fill(_build._GXX, _build.source_folder(), toolchain.find_torch())
    toolchain.run("g++", *flags, source, "-o", output)


def _mypy() -> Figure:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        done = _python("mypy", "--cache-dir", cache)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    spared = not_strict((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    value = f"{last}; spared: {', '.join(spared) or 'none'}"
    expected = "no issues; the Triton kernels alone spared"
    passed = done.returncode == 0 and all("triton" in name for name in spared)
    return Figure("mypy --strict", value, expected, passed, time.monotonic() - start)


def _tool(about: str, success: str, *command: str) -> Figure:
    start = time.monotonic()
    done = _python(*command)
    lines = (done.stdout + done.stderr).strip().splitlines()
    last = next((line for line in reversed(lines) if success in line), lines[-1] if lines else "")
    value = last.partition(" in ")[0]
    return Figure(about, value, success.strip(), done.returncode == 0 and success in last, time.monotonic() - start)


def _python(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)


def _compiled(name: str, compile_all: Callable[[Path], tuple[int, set[str]]]) -> Figure:
    start = time.monotonic()
    about = f"csrc compiled by {name} with {' '.join(WARNINGS)}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            number, flags = compile_all(Path(folder) / "library.so")
        except BuildError as error:
            return Figure(about, str(error).strip().splitlines()[0], "no warning", False)
    passed = number > 0 and set(WARNINGS) <= flags
    return Figure(about, f"{number} files, no warning", "no warning", passed, time.monotonic() - start)


def _host(output: Path) -> tuple[int, set[str]]:
    _build.build_host("plain", output)
    return len(objects.sources(_build.source_folder(), host=True)), set(_build._GXX)


def _cuda(output: Path) -> tuple[int, set[str]]:
    compiled = _build.build_cuda(output, strict=True, architectures=["90"])
    return len(compiled), {flag for words in _build._NVCC_STRICT for flag in words.split(",")}


def _names(found: Sequence[str]) -> str:
    return f": {', '.join(found)}" if found else ""
