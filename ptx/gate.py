"""`make ptx`: the package's Triton tests and drawn calls through compiled PTX, on sm_80 and sm_90.

Every launch runs with warps forward, backward and in random slices, a wgmma read early and late, and is checked for
bounds, alignment, races, what nobody wrote, copies in flight; results must have the same bits in every order. The two
architectures run side by side; in the small size of three tests one on each of them, in turn. Fails where anything
fails, nothing ran, or a kernel of the package was not reached.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import build

ARCHITECTURES = (80, 90)
# Cases of every group of ops that are drawn.
CASES = {"small": 2, "nightly": 60}
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Part:
    """One process. record: what it wrote down of itself, {} where it did not come that far."""

    name: str
    arch: int
    code: int
    record: dict
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx.gate", description=__doc__)
    parser.add_argument("--size", choices=tuple(CASES), default=os.environ.get("PTX_SIZE", "small"))
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--tests", nargs="*", help="files of tests (default: every python_tests/**/test_triton_*.py)")
    options = parser.parse_args(arguments)
    reason = build.problem()
    if reason is not None:
        print(f"ptx: {reason}", file=sys.stderr)
        return 2
    build.engine()
    began = time.perf_counter()
    tests = options.tests or sorted(str(path) for path in (_ROOT / "python_tests").rglob("test_triton_*.py"))
    with tempfile.TemporaryDirectory(prefix="ptx-gate-") as folder, ThreadPoolExecutor(2) as pool:
        work = [pool.submit(_architecture, arch, options.size, tests, Path(folder)) for arch in options.arch]
        parts = [part for done in work for part in done.result()]
    return report(parts, options.arch, package_kernels(), time.perf_counter() - began)


def _architecture(arch: int, size: str, tests: list[str], folder: Path) -> list[Part]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "ptx.plugin", "-p", "no:cacheprovider", "--tb=short", *tests]
    fuzz = [sys.executable, "-m", "ptx.fuzz", "--arch", str(arch), "--cases", str(CASES[size]), "--turn", str(arch)]
    return [
        _run("tests", arch, pytest, size, folder),
        _run("fuzz", arch, [*fuzz, "--record", str(folder / f"fuzz-{arch}")], size, folder),
    ]


def _run(name: str, arch: int, command: list[str], size: str, folder: Path) -> Part:
    record = folder / f"{name}-{arch}"
    environment = build.environment() | {
        "PTX_ARCH": str(arch), "PTX_SIZE": size, "PTX_RECORD": str(record), "PTX_CACHE": str(folder / "cache"),
        "ADAMIX_NIGHTLY": "1",  # the small size chooses from all cases
    }  # fmt: skip
    began = time.perf_counter()
    with subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        for line in child.stdout:
            print(f"sm_{arch} {name}: {line}", end="", flush=True)
    written = json.loads(record.read_text()) if record.exists() else {}
    return Part(name, arch, child.returncode, written, time.perf_counter() - began)


def in_turn(indices: set[int], arch: int, before: int) -> set[int]:
    """Those of the indices that this architecture runs in the small size: of three one on sm_80, one on sm_90, and one
    at night alone. before: how many came before them."""
    return {index for number, index in enumerate(sorted(indices), before) if number % 3 == arch // 10 % 2}


def chosen(count: int, stride: int = 28) -> set[int]:
    """Which of a test's parametrisations the small size runs: every stride-th, so the same on every machine.

    Both architectures together reach at least one of each op's ways.
    """
    return set(range(count // 2 % stride, count, stride)) or {0}


def package_kernels() -> set[str]:
    """The names of all Triton kernels of the package."""
    from reliability.fuzz_triton import kernels

    return set(kernels())


def report(parts: list[Part], architectures: Sequence[int], wanted: set[str], seconds: float) -> int:
    """Prints what ran, what did not and why; 0 where all is well."""
    problems = []
    for part in parts:
        record = part.record
        print(
            f"sm_{part.arch} {part.name}: {record.get('run', 0)} passed, {record.get('failed', 0)} failed, "
            f"{record.get('variants', 0)} compiled kernels, {part.seconds:.0f} s"
        )
        for reason, count in record.get("left_out", {}).items():
            print(f"    {count} left out: {reason}")
        if record.get("skipped"):
            print(f"    {record['skipped']} skipped themselves")
        if part.code or record.get("failed"):
            problems.append(f"sm_{part.arch}: the {part.name} failed (exit status {part.code})")
        if not record.get("run"):
            problems.append(f"sm_{part.arch}: no {part.name} ran")
    for arch in architectures:
        reached = {name for part in parts if part.arch == arch for name in part.record.get("kernels", ())}
        problems += [f"sm_{arch}: {name} was not reached" for name in sorted(wanted - reached)]
    for problem in problems:
        print(f"ptx: {problem}", file=sys.stderr)
    print(f"ptx: {'NOT SO' if problems else 'ok'}, {seconds:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
