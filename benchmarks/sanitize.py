"""`python -m benchmarks.sanitize`: every kernel once, forward and backward, on sizes full of tails.

Meant to run under compute-sanitizer: no comparison, no peers, nothing of torch beyond drawing the inputs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import torch

from .clock import synchronize
from .ledger import AbsentError
from .op_bench import fresh_leaves
from .op_cases import Draw
from .op_check import gradients
from .run_ops import OPS


def run(device: torch.device, names: Sequence[str]) -> list[str]:
    """Calls the contenders `names` of every case; returns what ran, in words."""
    ran = []
    for op in OPS:
        for case in importlib.import_module(f"benchmarks.bench_{op}").cases("odd", device):
            for contender in case.contenders:
                if contender.name not in names:
                    continue
                try:
                    binder = contender.open()
                    both_ways = "both" in case.traffic
                    inputs = fresh_leaves(case.make(Draw(device, case.dtype, seed=3)), both_ways)
                    bound = binder(inputs)
                    out = bound.call()
                    if both_ways:
                        gradients(bound, inputs.grad, out)
                except AbsentError:
                    continue
                synchronize(device)
                ran.append(f"{case.op} {contender.name} {case.shape}")
    return ran


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 when no kernel could run here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--names", nargs="+", default=["triton", "cuda"], help="contenders to run")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("sanitize: kernels run on a CUDA GPU, and this machine has none", file=sys.stderr)
        return 2
    ran = run(torch.device(options.device), options.names)
    print("\n".join(ran))
    print(f"{len(ran)} calls")
    return 0 if ran else 2


if __name__ == "__main__":
    sys.exit(main())
