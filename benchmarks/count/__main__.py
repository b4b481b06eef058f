"""Counts instructions, bytes and waves of every kernel at the sizes that matter, without a GPU, and what they predict:
`python -m benchmarks.count --help`. The counts come from executed PTX, the model from model.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import adamix_kernels

from . import full as count_full
from . import gates as count_gates
from . import page as count_page
from . import run as count_run
from . import table
from .run import TARGETS
from .table import TABLE, Row


def counted(
    ops: Sequence[str], backend: str, target: int, only: str, kept: dict[tuple, Row], launches_too: bool
) -> Iterator[Row]:
    """A row of every work of these ops whose name holds `only`; those of `kept` with the same sources are taken. What
    the executor cannot run is told, and has no row."""
    from adamix_kernels import backends
    from ptx.text import UnknownPtxError

    from . import cases as count_cases
    from . import cuda as count_cuda
    from . import row as count_row
    from . import triton as count_triton

    counter = (count_triton.TritonCounter if backend == "triton" else count_cuda.CudaCounter)(target)
    works = [
        work
        for op in ops
        if op in adamix_kernels.backends()[backend].ops
        for work in count_cases.works(op)
        if only in f"{work} {backend} sm_{target}" and work.compiles_for(target)
        if work.folder in backends()[backend].ops
    ]
    for number, work in enumerate(works, 1):
        old = kept.get((work.op, backend, work.case.shape, work.dtype, target))
        if old is not None and old.source == count_cases.fingerprint(work.folder, backend):
            yield old
            continue
        began = time.perf_counter()
        try:
            launches = counter.count(work)
        except UnknownPtxError as error:
            print(f"{work} {backend} sm_{target}: not counted: {error}", file=sys.stderr, flush=True)
            continue
        row = count_row.made(work, backend, target, launches)
        lines = [f"{number}/{len(works)} {described(row, time.perf_counter() - began)}"]
        lines += count_row.details(target, launches) if launches_too else []
        print("\n".join(lines), file=sys.stderr, flush=True)
        yield row


def described(row: Row, seconds: float) -> str:
    """One row in a line."""
    shares = ", ".join(f"{name} {value:.0%}" for name, value in row.shares.items())
    return (
        f"{row}: {row.kernels}; {row.instructions / 1e6:.1f} M instructions, {row.a_byte:.3f} a byte (PTX x "
        f"{row.sass_ratio:.2f}); loaded {row.loaded:.2f}, device {row.device:.2f} of the floor; {row.in_flight} B in "
        f"flight, {row.registers} registers, {row.blocks_an_sm} blocks, {row.warps_an_sm} warps an SM, {row.waves:.1f} "
        f"waves, {row.barriers:g} barriers, banks {row.bank_waves:.2f}; {row.limit}; {shares} ({seconds:.0f} s)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1: a count has grown, a row is missing, gates cost too much; 2: nothing can be counted."""
    from .cases import OPS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.count", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=tuple(OPS), default=list(OPS))
    parser.add_argument("--backends", nargs="+", choices=tuple(TARGETS), default=list(TARGETS))
    parser.add_argument("--targets", nargs="+", type=int, default=[], help="10 * compute capability (default: all)")
    parser.add_argument("--only", default="", help='rows whose name holds this text, as in "50257 bfloat16"')
    parser.add_argument("--launches", action="store_true", help="also a line for each launch, with the model's limits")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help=f"count what is new or changed, then write {TABLE.name}")
    mode.add_argument(
        "--page", action="store_true", help="count nothing: docs/counts.md and its picture from the table"
    )
    mode.add_argument("--check", action="store_true", help=f"count, and compare with {TABLE.name}")
    parser.add_argument("--reason", default="", help="with --write: why counts have grown")
    parser.add_argument("--out", type=Path, help="CSV of what was counted")
    parser.add_argument("--jobs", type=int, default=count_run.processors(), help="processes at a time (default: all)")
    parser.add_argument("--of", nargs=2, metavar=("BACKEND", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("count: TRITON_INTERPRET is set; interpreted kernels are not what is counted", file=sys.stderr)
        return 2
    if options.page:
        count_page.write(table.committed())
        return 0
    committed = {row.key: row for row in table.committed()}
    kept = committed if options.write else {}
    if options.of:
        backend, target = options.of
        for row in counted(options.ops, backend, int(target), options.only, kept, options.launches):
            count_run.give(row)
        return 0
    rows, found = [], []

    def take(row: Row) -> None:
        rows.append(row)
        if options.write:
            accepted, wrong = table.accepted(committed.get(row.key), row, options.reason)
            found.extend([wrong] if wrong else [])
            committed[row.key] = accepted
            # What is counted stays: stopped here, the next --write goes on from it.
            table.write(TABLE, committed.values())

    given = ["--ops", *options.ops, "--only", options.only, *["--launches"][: options.launches]]
    given += ["--write"] if options.write else []
    failed = count_run.run(count_run.pairs(options.backends, options.targets), given, max(1, options.jobs), take)
    if not rows:
        found.append(f"no row's name holds {options.only!r}")
    whole = (
        not (options.only or options.targets or failed)
        and set(options.ops) == set(OPS)
        and set(options.backends) == set(TARGETS)
    )
    gone = [row for row in committed.values() if row.key not in {one.key for one in rows}] if whole else []
    if options.write:
        table.write(TABLE, (row for row in committed.values() if row not in gone))
        count_page.write(table.committed())
    if options.check:
        found += table.problems(list(committed.values()), rows)
        found += [f"{row}: no such case any more" for row in gone]
    if options.write or options.check:
        now = committed if options.write else committed | {row.key: row for row in rows}
        found += count_gates.problems(list(now.values()), {row.key for row in rows})
        found += count_full.problems(now.values(), {row.key for row in rows})
    if options.out:
        table.write(options.out, rows)
    for line in [*found, *failed]:
        print(line)
    return 1 if found or failed else 0


if __name__ == "__main__":
    sys.exit(main())
