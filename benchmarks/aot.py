"""Compiles every Triton kernel for every supported GPU, without having one: `python -m benchmarks.aot --help`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from .aot_table import TABLE, Row, differences, hardest, mismatches, problems, read, write


def wanted() -> list[Row]:
    """Every case of every op on every target, not compiled."""
    from .aot_compile import described

    return [row for row, _ in described()]


def compiled(keys: Iterable[tuple], jobs: int = 2) -> list[Row]:
    """The rows of those cases, compiled now: `jobs` processes, a cache folder of their own."""
    keys = sorted(keys)
    with tempfile.TemporaryDirectory(prefix="adamix-aot-") as cache, _environment(TRITON_CACHE_DIR=cache):
        from .aot_compile import compile_keys

        # Neighbours cost alike: dealing them out in turn keeps the processes busy to the end.
        shares = [keys[n::jobs] for n in range(jobs)]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            return sorted((row for part in pool.map(compile_keys, shares) for row in part), key=lambda r: r.key)


@contextlib.contextmanager
def _environment(**values: str):
    """Variables for the processes started meanwhile; kernels are compiled, never interpreted."""
    before = dict(os.environ)
    os.environ.update(values)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.pop("ADAMIX_TRITON_TABLE", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where a limit is broken or the committed table is not what compiling gives; 2 without Triton."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help=f"compile everything, then write {TABLE.name}")
    mode.add_argument("--check", action="store_true", help=f"compile everything and compare with {TABLE.name}")
    mode.add_argument("--hardest", action="store_true", help="compile the hardest case of each kernel, dtype, target")
    mode.add_argument("--list", action="store_true", help="compile nothing: the cases alone")
    parser.add_argument("--out", type=Path, help="CSV of what was compiled or listed")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("aot: TRITON_INTERPRET is set; interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    if options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}, expected at least 1")
    try:
        want = wanted()
    except ModuleNotFoundError as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2

    committed = read(TABLE) if TABLE.exists() else []
    found = [] if options.write else mismatches(committed, want)
    if options.list:
        rows = want
    else:
        chosen = want
        if options.hardest:
            known = {row.key: row for row in committed}
            chosen = hardest(replace(known.get(row.key, row), config=row.config) for row in want)
        start = time.perf_counter()
        rows = compiled([row.key for row in chosen], options.jobs)
        print(f"{len(rows)} of {len(want)} cases compiled in {time.perf_counter() - start:.0f} s")
        found += problems(rows) + ([] if options.write else differences(committed, rows))
    if options.write:
        write(TABLE, rows)
    if options.out:
        write(options.out, rows)
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
