"""adamix bench: the benchmarks, which live beside the package in its source tree."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# The smaller of the two sizes, briefly: seconds, not minutes.
SMOKE = ("step", "--batch", "2", "--tokens", "16", "--repeats", "3", "--seconds", "0.2")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="adamix bench",
        description="Run python -m benchmarks.run in the source tree, or with tune first: python -m benchmarks.tune, "
        "which writes the Triton kernels' block sizes for this GPU.",
    )
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        help=f"of benchmarks.run (default, a smoke run: {' '.join(SMOKE)}), or tune and those of benchmarks.tune",
    )
    args = parser.parse_args(argv)
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").is_file():
        raise FileNotFoundError("the benchmarks are not part of an installed package: clone the source tree")
    arguments, module = list(args.arguments or SMOKE), "benchmarks.run"
    if arguments[0] == "tune":
        module = f"benchmarks.{arguments.pop(0)}"
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=root).returncode
