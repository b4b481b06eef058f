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
        description="Run python -m benchmarks.run in the source tree. Or, by the first word: gpu-proof, every GPU test "
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
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").is_file():
        raise FileNotFoundError("the benchmarks are not part of an installed package: clone the source tree")
    arguments, module = list(args.arguments or SMOKE), "benchmarks.run"
    if arguments[0] in MODULES:
        module = f"benchmarks.{MODULES[arguments.pop(0)]}"
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=root).returncode
