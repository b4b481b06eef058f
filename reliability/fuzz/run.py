"""Draws cases until so many have run to their end, and says how many did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.strategies import SearchStrategy

from ..one_thread import one_thread
from ..record import Figure

# The full size's; the small size takes what hypothesis derives from the test itself, the same every time.
SEED = 20260711


@dataclass
class Outcome:
    """ended: cases that ran to their end with all that must hold; failure: the first that did not, shrunk, or None."""

    about: str
    ended: int
    failure: str | None
    seconds: float


def run_cases(
    about: str,
    strategy: SearchStrategy,
    check: Callable[[object], None],
    count: int,
    derandomize: bool,
    first_turn: int = 0,
    shrink: bool = True,
) -> Outcome:
    """Runs `check` on exactly `count` drawn cases, or on as many as it takes to find one that fails.

    first_turn: another one draws other cases. shrink: whether a smaller case that fails is looked for.
    """
    start, ended, failure, turn = time.perf_counter(), 0, None, 0
    with one_thread():  # on a busy machine a few numbers shared out to two take ten times as long
        while ended < count and failure is None:
            number = SEED + 100 * first_turn + turn
            done, failure = _turn(strategy, check, count - ended, derandomize and turn == 0, number, shrink)
            ended += done
            turn += 1
            if turn > 20:
                failure = failure or f"hypothesis drew {ended} cases and no more"
    return Outcome(about, ended, failure, time.perf_counter() - start)


def _turn(strategy, check, count, derandomize, number, shrink) -> tuple[int, str | None]:
    ended = 0

    def body(case):
        nonlocal ended
        try:
            check(case)
        except AssertionError:
            raise
        except Exception as error:
            raise RuntimeError(f"{case}: {type(error).__name__}: {error}") from error
        ended += 1

    test = settings(
        max_examples=count,
        derandomize=derandomize,
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )(given(strategy)(body))
    if not derandomize:
        test = seed(number)(test)
    try:
        test()
    except Exception as error:
        return ended, str(error)
    return ended, None


def figure(outcome: Outcome, wanted: int) -> Figure:
    failed = "" if outcome.failure is None else f"; then {outcome.failure}"
    passed = outcome.failure is None and outcome.ended == wanted
    value = f"{outcome.ended:,} cases{failed}"
    return Figure(outcome.about, value, f"{wanted:,} cases, none fails", passed, outcome.seconds)
