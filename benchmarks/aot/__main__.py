"""Compiles every Triton kernel for every supported GPU, without having one: `python -m benchmarks.aot --help`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from adamix_kernels._scratch import temporary_folder

from .table import (
    SHARED_LIMITS,
    TABLE,
    Row,
    crowded,
    differences,
    hardest,
    mismatches,
    problems,
    read,
    spilled,
    unchanged,
    write,
)  # fmt: skip


def wanted() -> tuple[dict[Row, int], list[str]]:
    """({every case of every op on every target, not compiled: blocks its plan counts on}, ops without cases)."""
    from .compile import described, without_cases

    return {row: case.resident for row, case in described()}, without_cases()


def compiled(keys: Iterable[tuple], jobs: int = 2, cache: Path | None = None) -> Iterator[tuple[list[Row], list[str]]]:
    """(rows of some of those cases, what did not compile), part by part.

    jobs: processes. cache: Triton's folder of compiled kernels, named by their contents; None is an empty one.
    """
    keys = sorted(keys)
    parts = [keys[n : n + 8] for n in range(0, len(keys), 8)]
    start = time.perf_counter()
    with temporary_folder("adamix-aot-") as empty, _environment(TRITON_CACHE_DIR=str(cache or empty)):
        from .compile import compile_keys

        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            for number, part in enumerate(pool.map(compile_keys, parts), 1):
                yield part
                print(
                    f"{number} of {len(parts)} parts, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True
                )


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
    mode.add_argument("--write", action="store_true", help=f"compile what is new or changed, then write {TABLE.name}")
    mode.add_argument("--check", action="store_true", help=f"compile everything and compare with {TABLE.name}")
    mode.add_argument(
        "--hardest", type=int, nargs="?", const=sys.maxsize, metavar="N",
        help="compile the hardest cases, two a kernel and target; with N those N of them that need the most registers",
    )  # fmt: skip
    mode.add_argument("--list", action="store_true", help="compile nothing: the cases alone")
    parser.add_argument("--target", type=int, choices=SHARED_LIMITS, help="--hardest for this GPU alone")
    parser.add_argument("--out", type=Path, help="CSV of what was compiled or listed")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--cache", type=Path, help="Triton cache to reuse (default: an empty one, all is compiled)")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("aot: TRITON_INTERPRET is set; interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    if options.hardest is not None and options.hardest < 1:
        parser.error(f"--hardest: got {options.hardest}, expected at least 1")
    if options.target and not options.hardest:
        parser.error(f"--target: got {options.target} without --hardest, which alone takes it")
    if options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}, expected at least 1")
    try:
        counted_on, found = wanted()
    except ModuleNotFoundError as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2

    want = list(counted_on)
    committed = {row.key: row for row in read(TABLE)} if TABLE.exists() else {}
    found += [] if options.write else mismatches(list(committed.values()), want)
    if options.list:
        rows = want
    else:
        chosen, kept = want, []
        if options.write:
            kept = [committed[row.key] for row in want if unchanged(row, committed.get(row.key))]
            chosen = [row for row in want if not unchanged(row, committed.get(row.key))]
        elif options.hardest:
            rows = (committed.get(row.key, row) for row in want)
            chosen = hardest((row for row in rows if options.target in (None, row.target)), options.hardest)
        rows = sorted(kept, key=lambda row: row.key)
        for made, failed in compiled([row.key for row in chosen], options.jobs, options.cache):
            rows = sorted(rows + made, key=lambda row: row.key)
            found += failed + ([] if options.write else differences(list(committed.values()), made))
            if options.write:
                # What is compiled stays: stopped here, the next --write goes on from it.
                write(TABLE, rows)
        found += problems(rows) + crowded(rows, {row.key: blocks for row, blocks in counted_on.items()})
    if options.write:
        write(TABLE, rows)
    if options.out:
        write(options.out, rows)
    for line in found:
        print(line)
    if not options.list:
        for line in spilled(rows):
            print(f"note: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
