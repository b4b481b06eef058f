"""The stages of the GPU proof, in groups that run side by side; the most valuable groups first."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from adamix_kernels import _build

from .. import ROOT, sizes
from ..ops.run import OPS
from .run import Stage

TESTS = ROOT / "python_tests"
# Seconds of the timed benchmarks on a GPU.
_OP_SECONDS = {"routed_adapter": 40, "routed_lora": 40, "consistency": 65, "merge": 25}
_MODEL_SECONDS = {"bert-base": 45, "roberta-large": 55, "gpt2-medium": 45}
_MIXTURE_SECONDS = 30
_SMOKE_SECONDS = 300
# Shares of the GPU's memory while everything is checked at once; the tests have the rest.
_SHARES = {"consistency": 0.3, "routed_adapter": 0.05, "routed_lora": 0.05, "merge": 0.05}
_MODEL_SHARE = 0.12
_MIXTURE_SHARE = 0.04


def groups(folder: Path, out: Path, *, smoke: bool, skip: Sequence[str] = ()) -> list[list[Stage]]:
    """All stages; one named in `skip` (or its part before a slash) is left out.

    folder: for the CSVs and logs of single stages. out: the folder of results.
    """
    made = [
        [_environment(smoke)],
        [*_library(smoke), *_tests("triton", smoke), *_warm(folder, smoke)],
        _tests("cuda", smoke),
        *([_op(name, folder, smoke)] for name in OPS),
        *([_models(names, folder, smoke)] for names in _model_names(smoke)),
        [_bench("inference", ["inference"], folder, 25, smoke)],
        [_bench("mixtures", ["mixtures"], folder, _MIXTURE_SECONDS, smoke)],
        _sanitizers(smoke),
        [_tune(out, smoke)],
    ]
    wanted = [[s for s in group if s.name not in skip and s.name.partition("/")[0] not in skip] for group in made]
    return [group for group in wanted if group]


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _environment(smoke: bool) -> Stage:
    seconds = _SMOKE_SECONDS if smoke else 30
    return Stage("environment", _python("-m", "adamix_kernels", "env", "--json"), seconds)


def _library(smoke: bool) -> list[Stage]:
    """The C++/CUDA library, in place; what is up to date is not compiled again."""
    reason = "a smoke run builds nothing" if smoke else _build.obstacle() or ""
    return [Stage("build", _python("-m", "adamix_kernels._build"), 150, absent=reason)]


def _tests(family: str, smoke: bool) -> list[Stage]:
    """The test files that run kernels of "triton" or "cuda", by name or by what they import; one alone for smoke."""
    helper = {"triton": "triton_spy", "cuda": "cuda_host"}[family]
    files = [
        path for path in sorted(TESTS.rglob("test_*.py"))
        if path.name.startswith(f"test_{family}") or f"from {helper} import" in path.read_text(encoding="utf-8")
    ]  # fmt: skip
    if smoke:
        files = [path for path in files if path.name == "test_triton_merge.py"]
    seconds = _SMOKE_SECONDS if smoke else {"triton": 150, "cuda": 70}[family]
    return [stage_of_tests(path, seconds) for path in files]


def stage_of_tests(path: Path, seconds: float) -> Stage:
    """One file of tests; what it imports and is not installed is told."""
    name, missing = f"tests/{path.stem.removeprefix('test_')}", missing_imports(path)
    # What conftest.py needs.
    missing += [p for p in ("pytest", "hypothesis") if importlib.util.find_spec(p) is None and p not in missing]
    if missing:
        return Stage(name, absent=f"not installed: {', '.join(missing)}")
    command = _python("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", str(path))
    if importlib.util.find_spec("xdist") is not None and (os.cpu_count() or 1) >= 8:
        command += ["-n", "2"]
    # 5: the whole file was skipped.
    return Stage(name, command, seconds, environment={"TRITON_INTERPRET": ""}, skips=(5,), read=_read_tests)


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


def _read_tests(status: int, output: str) -> tuple[bool, str]:
    counts = count_tests(output)
    words = ", ".join(f"{number} {what.lower()}" for what, number in counts.items()) or "no test ran"
    bad = [line.partition(" ")[2] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
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


def _bench(
    name: str, arguments: list[str], folder: Path, seconds: float, smoke: bool, *, check: float = 0.0,
) -> Stage:  # fmt: skip
    """A benchmark's stage; check: instead of timing, check everything with that share of the GPU's memory."""
    command = _python("-m", "benchmarks.run", *arguments, f"--size={'smoke' if smoke else 'gpu'}")
    path = folder / f"{name.replace('/', '_')}.csv"
    if check:
        command += ["--check-only", f"--memory-share={check}"]
    seconds = _SMOKE_SECONDS if smoke else seconds
    # Compiling a model takes its time.
    return Stage(name, command, seconds, paced=True, csv=path, item_seconds=120.0 if check else 45.0)


def _op(name: str, folder: Path, smoke: bool) -> Stage:
    return _bench(name, ["op", name], folder, _OP_SECONDS[name], smoke)


def _model_names(smoke: bool) -> list[list[str]]:
    """A process for each model; in a smoke run one for all, since importing transformers is most of it."""
    names = list(sizes.STEPS["smoke" if smoke else "gpu"])
    return [names] if smoke else [[name] for name in names]


def _models(names: list[str], folder: Path, smoke: bool) -> Stage:
    seconds = sum(_MODEL_SECONDS.get(name, 0) for name in names)
    return _bench(f"steps/{'+'.join(names)}", ["models", *names], folder, seconds, smoke)


def _warm(folder: Path, smoke: bool) -> list[Stage]:
    """Every check, and every compilation of the timed stages, beside the tests: they fill the compilers' caches."""
    if smoke:
        return [Stage("check", absent="a smoke run checks where it times")]
    made = [_bench(f"check/{name}", ["op", name], folder, 140, smoke, check=_SHARES[name]) for name in OPS]
    for names in _model_names(smoke):
        made.append(_bench(f"check/{names[0]}", ["models", *names], folder, 140, smoke, check=_MODEL_SHARE))
    made.append(_bench("check/mixtures", ["mixtures"], folder, 140, smoke, check=_MIXTURE_SHARE))
    return made


def _sanitizers(smoke: bool) -> list[Stage]:
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    made = []
    for tool in ("memcheck", "racecheck", "initcheck"):
        name = f"sanitizer/{tool}"
        if program is None or smoke:
            made.append(Stage(name, absent="compute-sanitizer was not found" if program is None else "a smoke run"))
            continue
        options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        command = [program, *options, *_python("-m", "benchmarks.sanitize")]
        # Every tensor in an allocation of its own, so that its bounds are seen.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        made.append(Stage(name, command, 50, environment=environment, skips=(2,), read=read_sanitizer))
    return made


def read_sanitizer(status: int, output: str) -> tuple[bool, str]:
    """Errors that compute-sanitizer counted, and whether the program came to its end."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    calls = re.findall(r"^(\d+) calls$", output, flags=re.MULTILINE)
    first = re.search(r"^=+ +((?:Invalid|Error|Uninitialized|Warning|Race).*)$", output, flags=re.MULTILINE)
    words = [f"{calls[0]} calls" if calls else "did not come to its end", *(s for s in summary[-1:])]
    if first:
        words.append(f"first: {first.group(1)[:120]}")
    return status == 0 and bool(calls), "; ".join(words)


def _tune(out: Path, smoke: bool) -> Stage:
    path = out / "tune.json"
    command = _python("-m", "benchmarks.tune", f"--out={path}", "--repeats=10")
    return Stage("tune", command, _SMOKE_SECONDS if smoke else 30, paced=True, skips=(2,), read=_read_tune)


def _read_tune(status: int, output: str) -> tuple[bool, str]:
    done = len(re.findall(r"; shipped ", output))
    return status == 0, f"{done} classes of kernels"
