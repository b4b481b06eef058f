"""adamix bench: the benchmarks, which live beside the package in its source tree."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# The smaller of the two sizes, briefly: seconds, not minutes.
SMOKE = ("step", "--batch", "2", "--tokens", "16", "--repeats", "3", "--seconds", "0.2")
# First word of the command -> module of benchmarks.
MODULES = {"tune": "tune", "gpu-proof": "proof", "goals": "measure.goals"}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="adamix bench",
        description="Run python -m benchmarks.run in a clone of the sources: the one that this folder is in, or that "
        "the package is installed from (pip install -e). Or, by the first word: gpu-proof, every GPU test "
        "and benchmark in one command; goals, what the committed measurements say to each goal; tune, the Triton "
        "kernels' block sizes for this GPU.",
    )
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        help=f"of benchmarks.run (default, a smoke run: {' '.join(SMOKE)}), or one of those words and its own; see "
        "adamix bench gpu-proof --help",
    )
    args = parser.parse_args(argv)
    here, installed = Path.cwd(), Path(__file__).resolve().parents[2]
    # The package as well: it is the clone's that is measured.
    parts = "benchmarks/run.py", "adamix_kernels/__init__.py"
    places = (place for place in (here, *here.parents, installed) if all((place / part).is_file() for part in parts))
    root = next(places, None)
    if root is None:
        raise FileNotFoundError(
            "the benchmarks are not part of the installed package, and this folder is in no clone of its sources, "
            "expected adamix bench in one (git clone, then cd adamix_kernels)"
        )
    arguments, module = list(args.arguments or SMOKE), "benchmarks.run"
    if arguments[0] in MODULES:
        module = f"benchmarks.{MODULES[arguments.pop(0)]}"
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=root).returncode
