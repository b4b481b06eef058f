"""Builds the compiled library of this installation in place, or one that runs its kernels on the CPU, for tests."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import HOST_FLAGS, LIBRARY, RECORD, BuildError, build_cuda, build_host, source_folder
from .node import build_node
from .schedule import parallel
from .toolchain import find_torch


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1, with the reason on stderr, where nothing was built."""
    parser = argparse.ArgumentParser(prog="python -m adamix_kernels._build", description=__doc__)
    parser.add_argument("--host", nargs="?", const="plain", choices=HOST_FLAGS, help="with g++, to run on the CPU")
    parser.add_argument("--node", action="store_true", help="with g++, autograd's nodes alone, which serve Triton too")
    parser.add_argument("--output", type=Path, help="the shared object (default: where this package looks for it)")
    parser.add_argument("--jobs", type=int, help="files compiled at a time (default: $MAX_JOBS, else one a processor)")
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}, expected at least 1")
    try:
        if options.node:
            folder = (options.output or LIBRARY).parent
            print(build_node(folder, find_torch(), source_folder(), parallel(options.jobs)))
        elif options.host:
            print(build_host(options.host, options.output, jobs=options.jobs))
        else:
            output = options.output or LIBRARY
            build_cuda(output, jobs=options.jobs)
            names = json.loads((output.parent / RECORD).read_text())["architectures"]
            print(f"{output}: compute capability {', '.join(names)}")
    except (BuildError, OSError) as error:
        print(f"adamix_kernels._build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
