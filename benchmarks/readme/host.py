"""What a call costs on the host, in docs/performance.md and the README, from `python -m benchmarks.run host`'s rows."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ..measure.record import Row

MODES = ("forward", "forward with grad", "forward + backward")
TITLES = {"triton": "Triton", "cuda": "C++/CUDA"}
_ROUTED = {"triton": (18, 28, 85), "cuda": (9, 18, 55)}
_LOSS = dict.fromkeys(TITLES, (35, 35, 75))
# Adds that a call may cost at most, in the order of MODES.
GOALS: dict[str, dict[str, tuple[int, ...]]] = {
    "routed_adapter": _ROUTED,
    "routed_lora": _ROUTED,
    "routed_lora, in place": _ROUTED,
    "adamix_loss 64x2": _LOSS,
    "consistency_loss 32x2": _LOSS,
    "merge_banks, 96 banks": dict.fromkeys(TITLES, (80,)),
}
# What our calls in a whole step may cost at most, over the rest of the step.
STEP_GOAL = 0.15
FLOOR = "a Function of routed_adapter's tensors"


@dataclass(frozen=True)
class Cell:
    """One measured call or step: the 20th, 50th and 80th percentile, and its goal if it has one."""

    low: float
    middle: float
    high: float
    goal: float | None

    @property
    def met(self) -> bool | None:
        """None without a goal."""
        return None if self.goal is None else self.middle <= self.goal

    @property
    def settled(self) -> bool:
        return self.goal is None or not self.low <= self.goal <= self.high

    def words(self, form: str, goal_form: str) -> str:
        said = f"{self.middle:{form}} ({self.low:{form}} to {self.high:{form}})"
        if self.goal is not None:
            said += f", goal {self.goal:{goal_form}}: {'met' if self.met else '**missed**'}"
        return said + ("" if self.settled else ", not settled")


# (call or step, backend) -> mode -> what was measured.
Cells = dict[tuple[str, str], dict[str, Cell]]


def calls(rows: Sequence[Row]) -> Cells:
    """Adds of every call, a call's backends beside each other; a call without a mode counts as "forward"."""
    found: Cells = {}
    for r in rows:
        if r.metric == "host_p50" and r.unit == "torch.add":
            name, mode = r.op.removeprefix("host/"), MODES[0]
            for one in MODES:
                if name.endswith(f", {one}"):
                    name, mode = name.removesuffix(f", {one}"), one
            goals = GOALS.get(name, {}).get(r.backend)
            found.setdefault((name, r.backend), {})[mode] = _cell(rows, r, goals and goals[MODES.index(mode)])
    names = list(dict.fromkeys(name for name, _ in found))
    return dict(sorted(found.items(), key=lambda item: names.index(item[0][0])))


def steps(rows: Sequence[Row]) -> Cells:
    """What our calls take in every whole step over what its rest takes."""
    shares = [r for r in rows if r.metric == "ours over rest_p50"]
    return {(r.op.removeprefix("host/step of "), r.backend): {"": _cell(rows, r, STEP_GOAL)} for r in shares}


def sentence(rows: Sequence[Row]) -> str:
    """The README's: what one op costs, and how many goals are met; empty without rows."""
    found = {backend: modes for (name, backend), modes in calls(rows).items() if name == "routed_adapter"}
    if not found:
        return ""
    costs = [f"{modes[MODES[2]].middle:.0f} in {TITLES[backend]}" for backend, modes in sorted(found.items())]
    judged, whole = _judged(rows), [modes[""] for modes in steps(rows).values()]
    said = f"{sum(bool(c.met) for c in judged)} of {len(judged)} goals are met"
    if whole:
        said += f", of whole steps {sum(bool(c.met) for c in whole)} of {len(whole)}"
    return wrapped(
        "Host time of `routed_adapter`, forward and backward, with a stand-in driver on a CPU (no GPU figure), in "
        f"`torch.add`: {', '.join(costs)}; {said} (`python -m benchmarks.run host`)."
    )


def table(rows: Sequence[Row]) -> str:
    """The page's: every call and whole step beside its goal, and how it was measured; empty without rows."""
    if not rows:
        return ""
    lines = ["| call | backend | forward | with grad | forward + backward |", "|---|---|---|---|---|"]
    for (name, backend), modes in calls(rows).items():
        cells = " | ".join(modes[mode].words(".1f", "g") if mode in modes else "" for mode in MODES)
        title = "the like in PyTorch alone" if name == FLOOR else name
        lines.append(f"| {title} | {TITLES[backend]}{chr(39) + 's run' if name == FLOOR else ''} | {cells} |")
    open_ = sum(not cell.settled for cell in _judged(rows))
    unsettled = (
        f"Of {open_} the spread reaches across the goal: this run does not settle them."
        if open_
        else ("None of them is open: no spread reaches across its goal.")
    )
    parts = [_how(rows), wrapped(f"{_verdict(rows)}. {unsettled}"), "\n".join(lines), wrapped(_FLOOR)]
    whole = [
        f"| {name} | {TITLES[backend]} | {modes[''].words('.0%', '.0%')} |"
        for (name, backend), modes in steps(rows).items()
    ]
    if whole:
        head = ["| our calls in a step of | backend | over the rest of the step |", "|---|---|---|"]
        parts += [wrapped(_STEPS), "\n".join(head + whole)]
    return "\n\n".join(parts)


_FLOOR = (
    "The like in PyTorch alone: an autograd Function in Python that makes memory for routed_adapter's output and "
    "gradients and does no more."
)
_STEPS = (
    "Whole steps, forward and backward of a doubled batch: the model with adapters and loss less the model without, "
    "over the latter (the named model's layers, with so few columns that a CPU computes little):"
)


def _how(rows: Sequence[Row]) -> str:
    rounds, of_steps = re.search(r"rounds=(\d+) of calls, (\d+) of steps", rows[0].note).groups()
    loads = [float(re.search(r"load_after=([\d.]+)", r.note).group(1)) for r in rows]
    return wrapped(
        "What a call costs before a kernel runs, in `torch.add` of two 8 x 8 tensors beside it in the same run (one "
        f"took about {_add(rows):.1f} us): median, 20th to 80th percentile. **No GPU figures:** the tensors lie on a "
        "CPU and a stand-in driver launches nothing; a GPU's allocator and driver are not in it. "
        "`ADAMIX_CUDA_HOST=build/csrc/adamix_host_plain.so ADAMIX_HOST_IDLE=1 python -m benchmarks.run host --rounds "
        f"{rounds} --steps {of_steps} --out benchmarks/results/host_cpu.csv` (`python -m adamix_kernels._build --host "
        f"plain` makes the library): one thread's time on a shared {rows[0].cpu_name}, torch {rows[0].torch}, Triton "
        f"{rows[0].triton}, commit {', '.join(dict.fromkeys(r.commit for r in rows))}. Load of the machine when a "
        f"backend was done: {' to '.join(f'{load:.1f}' for load in dict.fromkeys((min(loads), max(loads))))}."
    )


def _verdict(rows: Sequence[Row]) -> str:
    """How many goals are met, and whose are not."""
    judged = _judged(rows)
    said = f"{sum(bool(cell.met) for cell in judged)} of {len(judged)} goals are met"
    missed: dict[str, list[str]] = {}
    for (name, backend), modes in calls(rows).items():
        if any(cell.met is False for cell in modes.values()):
            missed.setdefault(name.partition(",")[0], []).append(TITLES[backend])
    backends = {backend for _, backend in calls(rows)}
    parts = [name if len(of) == len(backends) else f"{name} in {of[0]}" for name, of in missed.items()]
    if any(cell.met is False for modes in steps(rows).values() for cell in modes.values()):
        parts.append("whole steps")
    return f"{said}; missed by {', '.join(parts)}" if parts else said


def _judged(rows: Sequence[Row]) -> list[Cell]:
    cells = [cell for found in (calls(rows), steps(rows)) for modes in found.values() for cell in modes.values()]
    return [cell for cell in cells if cell.goal is not None]


def _cell(rows: Sequence[Row], middle: Row, goal: float | None) -> Cell:
    """The spread that `middle` is the 50th percentile of."""
    values = {r.metric: r.value for r in rows if (r.op, r.backend, r.unit) == (middle.op, middle.backend, middle.unit)}
    low, high = (values[middle.metric.replace("p50", other)] for other in ("p20", "p80"))
    return Cell(low, middle.value, high, goal)


def _add(rows: Sequence[Row]) -> float:
    """Microseconds of one add, the middle one of all calls."""
    medians = {(r.op, r.backend, r.unit): r.value for r in rows if r.metric == "host_p50"}
    times = [(key, value) for key, value in medians.items() if key[2] == "us"]
    return statistics.median(value / medians[op, backend, "torch.add"] for (op, backend, _), value in times)


def wrapped(text: str) -> str:
    """A paragraph in lines of at most 118."""
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)
