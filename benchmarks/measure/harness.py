"""Paired timing on a machine whose speed drifts, and the rule that a red check is never timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class RedCheckError(AssertionError):
    """A correctness check failed, so nothing was timed; the message names the check and the error found."""


@dataclass(frozen=True)
class Check:
    """A correctness check: run() returns None when green, else what is wrong in words."""

    name: str
    run: Callable[[], str | None]


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile of a sample."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Timing:
    """Seconds a call, seconds[name][k] in round k; within a round all names ran right after one another."""

    seconds: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def time(self, name: str) -> Spread:
        """Seconds a call of `name`."""
        return spread(self.seconds[name])

    def ratio(self, name: str, other: str) -> Spread:
        """Per-round seconds of `name` over seconds of `other`."""
        return spread([a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)])


def spread(values: Sequence[float]) -> Spread:
    """Percentiles by linear interpolation; one value is its own spread."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(cuts[1], statistics.median(values), cuts[7])


def require_green(checks: Sequence[Check]) -> None:
    """Runs every check; raises RedCheckError naming each one that is red."""
    red = [f"{check.name}: {problem}" for check in checks if (problem := check.run()) is not None]
    if red:
        raise RedCheckError("nothing was timed, since a correctness check is red: " + "; ".join(red))


def time_paired(
    calls: dict[str, Callable[[int], object]],
    checks: Sequence[Check],
    *,
    rounds: int | None = None,
    seconds: float = 60.0,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    between: Callable[[], object] = lambda: None,
) -> Timing:
    """Times `calls` against each other in interleaved rounds, after all `checks` came out green.

    Args:
        calls: name -> call(k), k the round: every call of a round can work on the same inputs.
        checks: run first, once; a red one raises RedCheckError before anything is timed.
        rounds: how many; None fits them into `seconds`, between 11 and 1001.
        seconds: budget for the timed rounds when `rounds` is None.
        warmup: untimed rounds before.
        clock: seconds, monotonic.
        between: runs before every timed call, untimed.

    The order rotates from round to round and turns round every other one, so that no call always
    follows the same neighbour or stands first. Drift of the machine's speed hits all calls of a
    round alike and leaves their ratio.
    """
    require_green(checks)
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds: got {rounds}, expected at least 1")
    names = list(calls)
    last = 0.0
    for k in range(warmup):
        last = -clock()
        for name in names:
            between()
            calls[name](k)
        last += clock()
    if rounds is None:
        rounds = max(11, min(1001, int(seconds / last))) if last > 0 else 11
    taken: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        for name in _order(names, k):
            between()
            start = clock()
            calls[name](k)
            taken[name].append(clock() - start)
    return Timing(taken)


def _order(names: list[str], k: int) -> list[str]:
    turn = k // 2 % len(names)
    rotated = names[turn:] + names[:turn]
    return rotated if k % 2 == 0 else rotated[::-1]
