"""Drawn calls of every op through compiled PTX: `python -m ptx.fuzz --arch 90 --cases 4`.

The cases are those of `python -m reliability run fuzz_triton`, with all that must hold for them; here what the
executor reports fails a case too.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from reliability.fuzz.run import Outcome, run_cases

from . import host as hosts
from .draws import steady
from .host import summary

# That a group has at most to reach its kernels.
_TURNS = 6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx.fuzz", description=__doc__)
    parser.add_argument("--arch", type=int, default=80, help="10 * compute capability (default 80)")
    parser.add_argument("--cases", type=int, default=4, help="of every group (default 4)")
    parser.add_argument("--turn", type=int, default=0, help="another one draws other cases (default 0)")
    parser.add_argument("--record", type=Path, help="file for a summary, JSON")
    options = parser.parse_args(arguments)
    if options.cases < 1:
        parser.error(f"--cases: got {options.cases}, expected at least 1")
    host = hosts.install(options.arch)
    warnings.simplefilter("ignore", RuntimeWarning)
    failed = cases = 0
    for done in run(host, options.cases, options.turn):
        cases += done.ended
        failed += done.failure is not None
        said = "ok" if done.failure is None else f"NOT SO: {done.failure}"
        print(f"sm_{options.arch} {done.about}: {done.ended} cases, {done.seconds:.0f} s, {said}", flush=True)
    print(f"sm_{options.arch}: {cases} cases, {host}", flush=True)
    if options.record:
        record = {"run": cases, "failed": failed, "kernels": sorted(host.reached), "variants": len(host.kernels)}
        options.record.write_text(json.dumps(record))
    return 1 if failed or not host.launches else 0


def run(host: hosts.Host, count: int, turn: int) -> Iterator[Outcome]:
    """What became of every group: at least `count` cases, and more until each kernel that they should reach ran."""
    from reliability import fuzz_triton
    from reliability.fuzz.case import check

    def checked(case) -> None:
        host.begin()
        check(case, "triton", twice=False)
        assert not host.reports, f"{case}:\n{summary(host.reports)}"

    for group in fuzz_triton.groups():
        first, ended, seconds, failure = len(host.launches), 0, 0.0, None
        for again in range(_TURNS):
            with group.around(), steady():
                done = run_cases(group.about, group.cases, checked, count, False, turn + 1000 * again, shrink=False)
            ended, seconds, failure = ended + done.ended, seconds + done.seconds, done.failure
            if failure or set(group.kernels) <= {launch.kernel for launch in host.launches[first:]}:
                break
        yield Outcome(group.about, ended, failure, seconds)


if __name__ == "__main__":
    sys.exit(main())
