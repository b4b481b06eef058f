"""The tests of the GPU proof: those that run kernels, compiled, one pytest for Triton's and one for C++/CUDA's."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import ROOT
from .run import Stage

TESTS = ROOT / "python_tests"
# What a file imports whose tests run kernels of a family, and the share of the processors that the family takes.
_HELPERS = {"triton": "triton_spy", "cuda": "cuda_host"}
_SHARES = {"triton": 0.6, "cuda": 0.35}
# The kernels on the CPU alone.
_ON_THE_CPU = ("building",)
GUARD = "benchmarks.proof.guard"


def stages(seconds: float, smoke: bool) -> list[Stage]:
    """Both families side by side, and every file that cannot run here."""
    made = []
    for family in _HELPERS:
        there, absent = [], []
        for path in files(family):
            missing = missing_imports(path)
            if missing:
                absent.append(absent_stage(path, missing))
            else:
                there.append(path)
        if smoke:
            there, absent = [path for path in there if path.name == "test_triton_merge.py"], []
        if there:
            made.append(stage_of_tests(f"tests/{family}", there, seconds, _SHARES[family]))
        made += absent
    return made


def files(family: str) -> list[Path]:
    """The test files of "triton" or "cuda", by name or by what they import; the family's own room first."""
    wanted = f"from {_HELPERS[family]} import"
    found = [
        path for path in TESTS.rglob("test_*.py")
        if path.parent.name not in _ON_THE_CPU
        and (path.name.startswith(f"test_{family}") or wanted in path.read_text(encoding="utf-8"))
    ]  # fmt: skip
    return sorted(found, key=lambda path: (path.parent.name != f"{family}_impl", path))


def absent_stage(path: Path, missing: Sequence[str]) -> Stage:
    return Stage(f"tests/{path.stem.removeprefix('test_')}", absent=f"not installed: {', '.join(missing)}")


def stage_of_tests(name: str, paths: Sequence[Path], seconds: float, share: float) -> Stage:
    """Test files in one pytest; where xdist is, in so many processes, of which one that dies costs one test."""
    # What conftest.py needs.
    missing = [package for package in ("pytest", "hypothesis") if importlib.util.find_spec(package) is None]
    if missing:
        return Stage(name, absent=f"not installed: {', '.join(missing)}")
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", GUARD]
    # A file that cannot be imported here takes no other with it.
    command += ["--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, int(share * (os.cpu_count() or 1)))), "--dist", "load"]
    environment = {
        "TRITON_INTERPRET": "", "ADAMIX_CUDA_HOST": "",
        # A model that a test builds is not for verifying, and the library for the CPU not for compiling.
        "ADAMIX_AUTO": "table", "ADAMIX_GPU_PROOF": "1",
    }  # fmt: skip
    # 5: all was skipped.
    return Stage(name, [*command, *map(str, paths)], seconds, environment=environment, skips=(5,), read=read_tests)


def missing_imports(path: Path, seen: set[Path] | None = None) -> list[str]:
    """What a test file, or what it imports from its folder or support/, imports at its top and is not installed."""
    seen = set() if seen is None else seen
    seen.add(path)
    missing: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in {n.partition(".")[0] for n in names}:
            places = (folder / f"{name}.py" for folder in (path.parent, TESTS / "support"))
            local = next((place for place in places if place.exists()), None)
            if local is not None:
                if local not in seen:
                    missing += missing_imports(local, seen)
            elif not (ROOT / name).is_dir() and importlib.util.find_spec(name) is None:
                missing.append(name)
    return list(dict.fromkeys(missing))


_OUTCOME = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
# As pytest -v writes them, and as xdist does.
_TEST_LINE = re.compile(rf"::\S.* {_OUTCOME}\s.*\[\s*\d+%\]|\[\s*\d+%\] {_OUTCOME} ")
# guard.py's: a failure as soon as it is there, also of a run that is cut off.
_FAILED_LINE = re.compile(r"^at once: (?:FAILED|ERROR) (.*)$", re.MULTILINE)


def read_tests(status: int, output: str) -> tuple[bool, str]:
    counts = count_tests(output)
    words = ", ".join(f"{number} {what.lower()}" for what, number in counts.items()) or "no test ran"
    bad = [line.partition(" ")[2] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    bad = bad or _FAILED_LINE.findall(output)
    return status == 0, words + (f"; first: {bad[0][:160]}" if bad else "")


def count_tests(output: str) -> dict[str, int]:
    """Tests by outcome, from the lines of pytest -v, also of a run that was cut off."""
    counts: dict[str, int] = {}
    for line in output.splitlines():
        found = _TEST_LINE.search(line)
        if found:
            outcome = found.group(1) or found.group(2)
            counts[outcome] = counts.get(outcome, 0) + 1
    return counts
