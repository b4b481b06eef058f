"""`python -m benchmarks.run op NAME`: one op against its peers."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Iterable

import torch

from .. import sizes
from ..measure import ceilings, clock
from ..measure.ledger import BrokenDeviceError, Item, Ledger
from .bench import run_cases

OPS = ("routed_adapter", "routed_lora", "consistency", "merge")
# Exit status when a kernel left the GPU unusable for this process; --resume goes on after the item it died in.
BROKEN = 4


def add_parser(commands) -> None:
    parser = commands.add_parser("op", help="one op against its peers: forward, backward, both")
    parser.add_argument("name", choices=OPS)
    parser.add_argument("--brief", action="store_true", help="of peers, forward and backward together alone")
    add_run_options(parser)
    parser.set_defaults(run=run)


def add_run_options(parser: argparse.ArgumentParser, sets: Iterable[str] = sizes.SETS) -> None:
    """What every benchmark of the GPU proof takes."""
    parser.add_argument("--size", choices=tuple(sets), default="gpu", help="smoke: tiny, for tests of the harness")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check-only", action="store_true", help="check and compile everything, time nothing")
    parser.add_argument("--out", help="CSV to write, after every contender")
    parser.add_argument("--resume", action="store_true", help="go on after what --out holds")
    parser.add_argument("--seconds", type=float, help="begin no contender after so many seconds")
    parser.add_argument("--memory-share", type=float, default=1.0, help="of the GPU's memory, at most")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")


def open_ledger(options: argparse.Namespace) -> Ledger:
    """The rows of a run with these options, after the flags that all contenders share were set."""
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    if options.device == "cuda" and options.memory_share < 1:
        torch.cuda.set_per_process_memory_fraction(options.memory_share)
    deadline = None if options.seconds is None else time.monotonic() + options.seconds
    return Ledger(options.out, resume=options.resume, deadline=deadline)


def run(options: argparse.Namespace) -> int:
    """Exit status 0, also where contenders failed or were refused (the rows say so); 4 for a broken GPU."""
    ledger, device, smoke = open_ledger(options), torch.device(options.device), options.size == "smoke"
    cases = list(importlib.import_module(f"benchmarks.ops.{options.name}").cases(options.size, device))
    limits = None
    if not options.check_only:
        limits = ceilings.measure(device, {case.dtype for case in cases}, smoke=smoke)
        add_ceilings(ledger, options.name, limits)
    try:
        run_cases(cases, device, ledger, limits, clock.SMOKE if smoke else clock.FULL, brief=options.brief)
    except BrokenDeviceError:
        return BROKEN
    return 0


def add_ceilings(ledger: Ledger, where: str, limits: ceilings.Ceilings) -> None:
    """Rows of the ceilings, once a file."""
    if any(r.op == "ceiling/copy" for r in ledger.rows):
        return
    rows = [Item("ceiling/copy", "torch", where, "uint8").row("bandwidth", "GB/s", limits.copy / 1e9)]
    for dtype, operations in limits.matmul.items():
        item = Item("ceiling/matmul", "torch", where, str(dtype).removeprefix("torch."))
        rows.append(item.row("throughput", "TFLOP/s", operations / 1e12))
    ledger.add(rows)
