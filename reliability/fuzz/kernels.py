"""How many cases every kernel ran in: calls of the ops, until each kernel that they should reach has had its number."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from hypothesis.strategies import SearchStrategy

from ..record import Figure
from .case import Case, check
from .run import SEED, Outcome, figure, run_cases

# Turns that a group has, and the share of its cases that may be the rarest launch's.
_TURNS, _RAREST = 12, 0.02


@dataclass(frozen=True)
class Group:
    """Cases of one op.

    kernels: those that most of them launch. around: what makes the op take another of its ways. twice: of so many cases
    one runs a second time, for the same bits.
    """

    about: str
    cases: SearchStrategy[Case]
    kernels: tuple[str, ...]
    around: Callable[[], AbstractContextManager] = nullcontext
    twice: int = 1


def run_groups(
    groups: list[Group], backend: str, launches: Callable[[], AbstractContextManager[list[str]]],
    every_kernel: tuple[str, ...], wanted: int, small: bool,
) -> Iterator[Figure]:  # fmt: skip
    """A figure for each group, then one for each kernel: the cases that it ran in and that ended well.

    launches: a context that gives the names of the kernels launched within it. every_kernel: all there are.
    """
    counts: Counter[str] = Counter()

    def counted(case: Case, twice: int) -> None:
        drawn = counts["cases"]
        with launches() as names:
            check(case, backend, twice=drawn % twice == 0)
        counts.update({"cases", *names})

    for group in groups:
        outcome = _run_group(group, partial(counted, twice=group.twice), counts, wanted, small)
        about = f"{outcome.about}: drawn cases" + ("" if small else f", seed {SEED}")
        yield figure(Outcome(about, outcome.ended, outcome.failure, outcome.seconds), outcome.ended)
    for kernel in every_kernel:
        reached = counts[kernel]
        yield Figure(f"{kernel}: cases it ran in", f"{reached:,} cases", f"at least {wanted:,}", reached >= wanted)


def _run_group(group: Group, counted, counts: Counter[str], wanted: int, small: bool) -> Outcome:
    before, ended, seconds = Counter(counts), 0, 0.0
    for turn in range(_TURNS):
        reached = min(counts[kernel] - before[kernel] for kernel in group.kernels)
        if reached >= wanted:
            break
        # As many as it takes at the rate so far, and some more; a rate of few cases is luck.
        rate = max(reached / ended, _RAREST) if ended else 1.0
        count = max(8, min(math.ceil(1.2 * (wanted - reached) / rate), 3 * ended or wanted + wanted // 4))
        with group.around():
            outcome = run_cases(group.about, group.cases, counted, count, small and turn == 0, turn)
        ended, seconds = ended + outcome.ended, seconds + outcome.seconds
        if outcome.failure is not None:
            return Outcome(group.about, ended, outcome.failure, seconds)
    return Outcome(group.about, ended, None, seconds)


@contextlib.contextmanager
def all_of(*contexts: AbstractContextManager) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
