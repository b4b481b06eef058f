"""adamix verify: proves every kernel on this machine's GPUs, and says what backend="auto" takes from then on."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import verifying
from .._auto import SHAPES
from ..models._files import write_json
from ..verifying import Report
from ..verifying.machine import DTYPES, KERNELS
from ..verifying.verdicts import CRASHED, UNKNOWN, WRONG, Store, cache_folder
from . import env
from ._options import needs_file

# Beside those of every command.
BAD, INCOMPLETE = 1, 3


def main(argv: Sequence[str]) -> int:
    """0: every kernel that can run here is right. 1: one is wrong or crashed. 3: nothing, or not all, was verified."""
    parser = argparse.ArgumentParser(
        prog="adamix verify",
        description="Run every kernel on this machine's GPUs, in a process of its own, against the reference in "
        'float64. backend="auto" then uses those that are right and preferred there. What was found out is kept, so '
        "that a second run takes no time.",
        epilog="exit status: 0 every kernel that can run here is right; 1 one is wrong or crashed, and not used; 3 "
        "nothing, or not everything, could be verified here; 2 wrong usage.",
    )
    for name, choices in (("ops", tuple(SHAPES)), ("dtypes", DTYPES), ("backends", KERNELS)):
        text, one = f"these alone, of: {', '.join(choices)}", name[:-1].upper()
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices, metavar=one, help=text)
    seconds = verifying.prover.EVERYTHING
    text = f"the most, for each kind of GPU (default: {seconds:g})"
    parser.add_argument("--seconds", type=float, default=seconds, metavar="X", help=text)
    parser.add_argument("--again", action="store_true", help="verify what has a verdict, too")
    parser.add_argument("--export", metavar="FILE", help="write everything as JSON, to attach to an issue")
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        raise ValueError(f"--seconds: got {args.seconds:g}, expected more than 0")
    if args.export:
        needs_file("--export", args.export)
    report = verifying.verify(
        ops=args.ops,
        dtypes=[getattr(torch, name) for name in args.dtypes],
        backends=args.backends,
        seconds=args.seconds,
        again=args.again,
        **({"progress": _bar} if sys.stderr.isatty() else {}),
    )
    if sys.stderr.isatty():
        print(file=sys.stderr, end="\r" + " " * (_width() - 1) + "\r")
    print(in_words(report))
    if args.export:
        write_json(Path(args.export), exported(report))
        print(f"\nWritten to {args.export}")
    return status(report)


def status(report: Report) -> int:
    """The exit status."""
    if report.of(WRONG) or report.of(CRASHED):
        return BAD
    return INCOMPLETE if report.problem or report.of(UNKNOWN) or not report.verdicts else 0


def in_words(report: Report) -> str:
    """What was found out: a table for each GPU, and what is wrong."""
    if not report.verdicts:
        states = verifying.backends()
        lines = [f"Nothing was verified: {report.problem or 'no kernel can run on the GPUs here'}."]
        lines += [f"  {name}: {states[name].reason}" for name in KERNELS]
        lines += ['backend="auto" takes the reference here; a kernel is taken only where it was verified, on a GPU.']
        return "\n".join(textwrap.fill(line, max(80, _width()), subsequent_indent="    ") for line in lines)
    parts = []
    for gpu in dict.fromkeys(verdict.gpu for verdict in report.verdicts):
        kept = f"kept in {cache_folder()}" if any(Store().folder.glob("*.json")) else "not kept"
        parts.append(f"{gpu}, in {report.seconds:.0f} s; {kept}\n\n{_table(report, gpu)}")
    bad = [verdict for verdict in report.verdicts if verdict.state in (WRONG, CRASHED)]
    parts += [f"{verdict.job}: {verdict.state}: {verdict.why}" for verdict in bad]
    late = report.of(UNKNOWN)
    if late:
        parts.append(f"{len(late)} are unknown: {late[0].why}")
    if bad:
        parts.append('What is wrong or crashed is not used by "auto". Please attach --export FILE to an issue.')
    return "\n\n".join(parts)


def exported(report: Report) -> dict[str, Any]:
    """Everything that a maintainer needs, and no path of this machine."""
    facts = env.describe()
    facts["cuda_library"].pop("path", None)
    facts["auto"].pop("cache", None)
    for state in facts["backends"].values():
        state.pop("verdicts", None)
    return {
        "format": 1,
        "environment": facts,
        "problem": report.problem,
        "verdicts": [verdict.__dict__ for verdict in report.verdicts],
        "auto": [[*key, backend] for key, backend in report.chosen.items()],
    }


def _table(report: Report, gpu: str) -> str:
    states = {verdict.job: verdict.state for verdict in report.verdicts if verdict.gpu == gpu}
    kernels = [name for name in KERNELS if any(job.backend == name for job in states)]
    rows = [["op", "shapes", "dtype", *kernels, "auto"]]
    for (name, op, dtype, shape), backend in report.chosen.items():
        if name == gpu:
            found = [next((s for j, s in states.items() if j == (op, kernel, dtype, shape)), "-") for kernel in kernels]
            rows.append([op, shape, dtype, *found, backend])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in rows)


def _bar(done: int, total: int, words: str) -> None:
    share = done / max(1, total)
    line = f"[{'#' * round(20 * share):20}] {done}/{total} {words}"
    print("\r" + line[: _width() - 1].ljust(_width() - 1), end="", file=sys.stderr, flush=True)


def _width() -> int:
    return shutil.get_terminal_size().columns
