"""Compiles csrc/ for every GPU it is meant for, with warnings as errors: `python -m benchmarks.cuda_compile --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adamix_kernels._build import BuildError

from .compile import WHEELS, compiled
from .table import SHAPES, TABLE, differences, problems, read, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where a limit is broken or the committed table is not what compiling gives; 2 uncompiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_compile", description=__doc__.partition("\n")[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help=f"write {TABLE.name} anew")
    mode.add_argument("--check", action="store_true", help=f"compare with {TABLE.name} (the default)")
    parser.add_argument("--out", type=Path, help="CSV of what was compiled")
    parser.add_argument("--jobs", type=int, help="files compiled at a time (default: $MAX_JOBS, else one a processor)")
    parser.add_argument("--nvrtc", type=Path, default=WHEELS, help="folder of NVRTC's wheels")
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}, expected at least 1")
    try:
        rows = compiled(options.jobs, options.nvrtc)
    except BuildError as error:
        print(f"cuda_compile: {error}", file=sys.stderr)
        return 2
    if options.out:
        write(options.out, rows)
    found = problems(rows)
    if options.write:
        write(TABLE, rows)
    else:
        found += differences(read(TABLE) if TABLE.exists() else [], rows)
    for line in found:
        print(line)
    kernels = {row.key[:2] for row in rows}
    print(f"{len(kernels)} kernels, {len(rows)} rows, targets {', '.join(f'sm_{t}' for t in SHAPES)}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
