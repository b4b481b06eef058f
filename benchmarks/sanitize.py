"""`python -m benchmarks.sanitize`: every kernel once, forward and backward, on sizes full of tails.

Meant to run under compute-sanitizer: no comparison, no peers, nothing of torch beyond drawing the inputs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence

import torch

from adamix_kernels._backends import BackendUnavailableError, select

from .measure.clock import synchronize
from .measure.ledger import AbsentError
from .ops.bench import fresh_leaves
from .ops.cases import Draw
from .ops.check import gradients
from .ops.run import OPS

# With gates, and routers, beside the ops that have peers.
GATED = ("gated_lora", "gated_adapter", "mixture_lora", "router")


def run(device: torch.device, names: Sequence[str], ends: float = float("inf")) -> list[str]:
    """Calls the contenders `names` of every case; returns what ran, in words, which it prints as it goes.

    ends: when by time.monotonic() no further call is begun.
    """
    ran = []
    for op in (*OPS, *GATED):
        for case in importlib.import_module(f"benchmarks.ops.{op}").cases("odd", device):
            for contender in case.contenders:
                if contender.name not in names or time.monotonic() > ends:
                    continue
                try:
                    binder = contender.open()
                    both_ways = set(case.traffic) != {"forward"}
                    inputs = fresh_leaves(case.make(Draw(device, case.dtype, seed=3)), both_ways)
                    bound = binder(inputs)
                    out = bound.call()
                    if both_ways:
                        gradients(bound, inputs.grad, out)
                except AbsentError:
                    continue
                synchronize(device)
                ran.append(f"{case.op} {contender.name} {case.shape}")
                print(ran[-1], flush=True)
    return ran


def wrong_ids(device: torch.device, names: Sequence[str]) -> list[str]:
    """Calls the routed ops with ids outside their banks, below the public functions' checks; returns what ran.

    Nothing may be read that is not there, whatever an id says.
    """
    ran = []
    batch, tokens, width, rank, experts = 3, 21, 40, 6, 3
    for backend in sorted({"triton", "cuda"} & set(names)):
        for wide in (torch.int32, torch.int64):
            info, right = torch.iinfo(wide), torch.arange(batch, dtype=wide, device=device)
            wrong = right.repeat_interleave(tokens).view(batch, tokens)
            wrong[:, 3:8] = torch.tensor([-1, experts, info.min, info.max, 1 << 20], dtype=wide, device=device)
            draw = lambda *shape: torch.randn(*shape, dtype=torch.float16, device=device)  # noqa: E731
            x, down, up = draw(batch, tokens, width), draw(experts, rank, width), draw(experts, width, rank)
            try:
                adapter, lora = (select(op, backend, device, x.dtype) for op in ("routed_adapter", "routed_lora"))
            except BackendUnavailableError:
                continue
            for ids in ((wrong, right), (right, wrong)):
                _, pre = adapter.forward(x, down, None, up, None, *ids, None, True, "gelu")
                adapter.backward(x, x, pre, down, up, *ids, True, True, True, True, "gelu")
                _, t = lora.forward(x, down, up, *ids, x, None, 1.0, 1, [0], 0.0)
                lora.backward(x, x, t, down, up, *ids, None, True, True, True, 1.0, 1, [0], 0.0)
                synchronize(device)
                ran += [f"{op} {backend} wrong {wide} ids" for op in ("routed_adapter", "routed_lora")]
                print("\n".join(ran[-2:]), flush=True)
    return ran


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 when no kernel could run here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--names", nargs="+", default=["triton", "cuda"], help="contenders to run")
    parser.add_argument("--seconds", type=float, help="begin no call after so many seconds")
    options = parser.parse_args(arguments)
    ends = float("inf") if options.seconds is None else time.monotonic() + options.seconds
    if options.device == "cuda" and not torch.cuda.is_available():
        print("sanitize: kernels run on a CUDA GPU, and this machine has none", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    # The ids first: few calls, and the most that can go wrong.
    ran = wrong_ids(device, options.names) + run(device, options.names, ends)
    if time.monotonic() > ends:
        print("the time was used up before every call")
    print(f"{len(ran)} calls")
    return 0 if ran else 2


if __name__ == "__main__":
    sys.exit(main())
