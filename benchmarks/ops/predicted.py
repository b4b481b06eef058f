"""`python -m benchmarks.run predicted`: what benchmarks/results/count.csv predicts the speed of, measured.

Our kernels alone, at every size that is counted, replayed from a CUDA graph: the share of copy bandwidth, which
count/beside.py puts beside the prediction. Whoever was checked by a run with --check-only, whose CSV lies beside this
one's, is not checked again.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..count import table as count_table
from ..count.cases import OPS, Work, bound, works
from ..measure import ceilings, clock, record
from ..measure.harness import spread
from ..measure.ledger import BrokenDeviceError, Item, Ledger
from .bench import free, watching
from .cases import Case, Draw, Inputs, require_usable
from .check import require_agreement
from .run import BROKEN, add_ceilings, add_run_options, open_ledger

BACKENDS = ("triton", "cuda")
EFFORT = clock.Effort(seconds=0.03, least=5, most=41, warmup=2)
# Whose formula has no gradient by what their kernels give one for.
_OTHER_GRADIENTS = ("adamix_loss_full",)
CHECKS = "check_predicted*.csv"


@dataclass(frozen=True)
class Job:
    """One of our backends on a case, in the directions that are counted."""

    folder: str
    case: Case
    directions: tuple[str, ...]
    backend: str

    @property
    def item(self) -> Item:
        return Item(f"{self.case.op}/predicted", self.backend, self.case.shape, _dtype(self.case))


def jobs(target: int) -> list[Job]:
    """What the table has for 10 * compute capability; the ops take turns, so that time that runs out costs none of them
    everything."""
    counted = {(r.op, r.backend, r.shape, r.dtype) for r in count_table.committed() if r.target == target}
    by_op = []
    for folder in OPS:
        made = []
        for case, given in _by_case(works(folder)):
            for backend in BACKENDS:
                key = backend, case.shape, _dtype(case)
                directions = tuple(work.direction for work in given if (work.op, *key) in counted)
                if directions:
                    made.append(Job(folder, case, directions, backend))
        by_op.append(made)
    return [job for turn in itertools.zip_longest(*by_op) for job in turn if job is not None]


def _by_case(given: Iterator[Work]) -> list[tuple[Case, list[Work]]]:
    found: dict[int, tuple[Case, list[Work]]] = {}
    for work in given:
        found.setdefault(id(work.case), (work.case, []))[1].append(work)
    return list(found.values())


def _dtype(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def measure(given: list[Job], device: torch.device, ledger: Ledger, copy: float | None, checked: set[Item]) -> None:
    """Fills `ledger`; copy: bytes a second, None: only check. Raises BrokenDeviceError for a GPU that is lost."""
    for job in given:
        with ledger.item(job.item, "checked" if copy is None else "timed") as rows:
            if rows is None:
                continue
            require_usable(job.backend, job.folder, device)
            with watching(device):
                if copy is None or job.item not in checked:
                    _check(job, device)
                if copy is not None:
                    for direction in job.directions:
                        rows += _timed(job, direction, device, copy)
                else:
                    for direction in job.directions:
                        _call(job, direction, [_inputs(job.case, device, 2)])(0)
        free(device)


def _check(job: Job, device: torch.device) -> None:
    case = replace(job.case, make=lambda draw: _inputs(job.case, device, draw))
    both_ways = job.directions != ("forward",) and case.op not in _OTHER_GRADIENTS
    contender = next(one for one in case.contenders if one.name == job.backend)
    require_agreement(case, contender, contender.open(), device, both_ways)


def _inputs(case: Case, device: torch.device, drawn: int | Draw) -> Inputs:
    """With the gradient where the output is."""
    inputs = case.make(Draw(device, case.dtype, drawn) if isinstance(drawn, int) else drawn)
    return inputs if inputs.grad is None else replace(inputs, grad=inputs.grad.to(device))


def _call(job: Job, direction: str, sets: list[Inputs]) -> clock.Call:
    """The direction on inputs that rotate; made anew for the stream that captures it."""
    made = [bound(job.case, job.backend, inputs, direction != "forward") for inputs in sets]
    if direction == "forward":

        def forward(k: int) -> object:
            with torch.no_grad():
                return made[k % len(made)].call()

        return forward
    if direction == "both":
        return lambda k: _gradients(made[k % len(made)], sets[k % len(made)], made[k % len(made)].call())
    outs = [one.call() for one in made]
    return lambda k: _gradients(made[k % len(made)], sets[k % len(made)], outs[k % len(made)], retain=True)


def _gradients(one, inputs: Inputs, out: object, retain: bool = False) -> object:
    value = out if isinstance(out, torch.Tensor) else out[0]
    return torch.autograd.grad(value, list(one.leaves), inputs.grad, retain_graph=retain)


def _timed(job: Job, direction: str, device: torch.device, copy: float) -> list[record.Row]:
    case, op = job.case, f"{job.case.op}/{direction}"
    first = _inputs(case, device, 2)
    count = clock.rotation(clock.nbytes((*first.leaves, *first.extra, first.grad)), device)
    sets = [first, *(_inputs(case, device, 2 + k) for k in range(1, count))]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call = _call(job, direction, sets)
        seconds = spread(clock.graph_seconds(call, count, EFFORT, stream=stream))
    rows = [
        job.item.row(f"graph_time_{name}", "us", 1e6 * value, op=op)
        for name, value in (("p20", seconds.p20), ("p50", seconds.p50), ("p80", seconds.p80))
    ]
    share = case.traffic[direction] / seconds.p50 / copy
    return [*rows, job.item.row("copy_share", "1", share, "replayed from a CUDA graph", op=op)]


def add_parser(commands) -> None:
    parser = commands.add_parser("predicted", help="our kernels at every size whose speed count.csv predicts, on a GPU")
    parser.add_argument("--piece", default="0/1", help="K/N: every N-th from the K-th on")
    add_run_options(parser, ("gpu", "smoke"))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Exit status 0, also where some failed or were refused; 2 without a GPU; 4 for a broken one."""
    if options.device != "cuda" or options.size == "smoke":
        print("predicted: speeds are predicted of GPUs")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    # The model has no code of later ones: B200's predictions are sm_90's counts.
    target = min(10 * major + minor, 90)
    ledger = open_ledger(options)
    piece, of = map(int, options.piece.split("/"))
    given, copy, checked = jobs(target)[piece::of], None, set[Item]()
    if not options.check_only:
        limits = ceilings.measure(device, set(), smoke=False)
        copy = limits.copy
        add_ceilings(ledger, "predicted", limits)
        checked = known(Path(options.out)) if options.out else checked
    try:
        measure(given, device, ledger, copy, checked)
    except BrokenDeviceError:
        return BROKEN
    return 0


def known(out: Path) -> set[Item]:
    """Whom the runs beside this one have checked."""
    rows = [row for path in sorted(out.parent.glob(CHECKS)) for row in record.read(path) if row.metric == "checked"]
    return {Item(row.op, row.backend, row.shape, row.dtype) for row in rows}
