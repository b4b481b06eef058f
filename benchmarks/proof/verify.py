"""`python -m benchmarks.proof.verify`: adamix verify on as many processors as there are; its last line counts."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from adamix_kernels import verifying
from adamix_kernels.commands import verify
from adamix_kernels.models._files import write_json
from adamix_kernels.verifying import prover, verdicts

# Seconds of a case, and of a process to start: other compilers keep the processors busy, and that is no kernel's doing.
ONE_CASE, START = 60.0, 100.0
INCOMPLETE = verify.INCOMPLETE


def main(arguments: Sequence[str] | None = None) -> int:
    """As `adamix verify`: 0 all right, 1 one is wrong or crashed, 3 not all was verified."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof.verify", description=__doc__)
    parser.add_argument("--export", help="JSON to write, as adamix verify --export writes it")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) * 5 // 8))
    parser.add_argument("--seconds", type=float, default=100.0)
    options = parser.parse_args(arguments)
    real = prover.prove

    def wide(jobs: Any, machine: Any, store: Any, seconds: float, one_case: float, again: bool, progress: Any) -> Any:
        return real(jobs, machine, store, seconds, max(one_case, ONE_CASE), again, progress, options.processes)

    with mock.patch.object(prover, "prove", wide), mock.patch.object(prover, "START", START):
        report = verifying.verify(seconds=options.seconds)
    print(verify.in_words(report))
    if options.export:
        write_json(Path(options.export), verify.exported(report))
    states = verdicts.RIGHT, verdicts.WRONG, verdicts.CRASHED, verdicts.UNKNOWN
    bad = [one for one in report.verdicts if one.state in (verdicts.WRONG, verdicts.CRASHED)]
    words = ", ".join(f"{len(report.of(state))} {state}" for state in states)
    names = "; ".join(f"{one.job} is {one.state}: {one.why}" for one in bad)
    print(f"verified: {words}" + (f": {names}" if names else ""))
    return verify.status(report)


def read(status: int, output: str) -> tuple[bool, str]:
    """Whether nothing was wrong and something right, and what was."""
    found = re.findall(r"^verified: (.*)$", output, flags=re.MULTILINE)
    if not found:
        return False, f"did not come to its end (exit status {status})"
    return status in (0, INCOMPLETE) and not found[-1].startswith("0 right"), found[-1][:600]


if __name__ == "__main__":
    sys.exit(main())
