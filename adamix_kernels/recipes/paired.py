"""Differences seed by seed between two methods, with intervals."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models._files import make_folder, replace_file
from .summary import Group, Line, group_rows

# 97.5% points of Student's t with 1 to 9 degrees of freedom; beyond, a series in 1 / freedom is right to 0.001.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True)
class Difference:
    """One line of a table of differences: `line` minus the line compared with, on the seeds that both have.

    Attributes:
        mean, low, high: the mean and its 95% interval (Student's t over the seeds); low and high are NaN for one seed.
        above: seeds on which the line is above.
    """

    line: Line
    mean: float
    low: float
    high: float
    above: int
    seeds: int

    @property
    def text(self) -> str:
        """ "+2.2 (0.8 to 3.6), above in 5 of 5"."""
        interval = "" if math.isnan(self.low) else f" ({self.low:+.1f} to {self.high:+.1f})"
        return f"{self.mean:+.1f}{interval}, above in {self.above} of {self.seeds}"


def differences(group: Group, against: str) -> list[Difference]:
    """Every line of the group minus the line that `against` names, on the group's first metric, seed by seed.

    Args:
        against: a method, "pfeiffer" (of several evaluations the gated one, else the merged), or a line's whole name:
            "adamix, merged".

    Lines that share no seed with it, and itself, are left out. Raises ValueError for a name that is no line's.
    """
    other = find_line(group, against)
    base = _by_seed(other, group.metric)
    found = []
    for line in group.lines:
        mine = _by_seed(line, group.metric)
        both = [mine[seed] - base[seed] for seed in mine if seed in base]
        if line is other or not both:
            continue
        mean, (low, high) = statistics.mean(both), interval(both)
        found.append(Difference(line, mean, low, high, sum(value > 0 for value in both), len(both)))
    return found


def find_line(group: Group, name: str) -> Line:
    """The line of that name or method: of several evaluations the gated one, else the merged, else the first."""
    order = {"gates": 0, "merged": 1, "plain": 2}
    lines = [line for line in group.lines if name in (line.name, line.method)]
    if not lines:
        names = ", ".join(dict.fromkeys(line.method for line in group.lines))
        raise ValueError(f"against: got {name!r}, expected one of {names}")
    return min(lines, key=lambda line: order.get(line.evaluation, 3))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean by Student's t; (NaN, NaN) for fewer than two values.

    >>> [round(end, 2) for end in interval([1.0, 2.0, 3.0])]
    [-0.48, 4.48]
    """
    if len(values) < 2:
        return math.nan, math.nan
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = t_point(len(values) - 1) * error
    return mean - reach, mean + reach


def t_point(freedom: int) -> float:
    """The 97.5% point of Student's t with `freedom` degrees of freedom."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def write_differences(rows: Sequence[dict[str, Any]], against: Sequence[str], folder: str | os.PathLike[str]) -> Path:
    """Writes differences.md: for every comparison of the rows that has all of `against`, its table.

    Raises ValueError where none has.
    """
    parts, problem = [], ValueError("results: got no rows, expected at least one finished run")
    for group in group_rows(rows):
        try:
            parts.append(f"### {group.title}\n\n{differences_table(group, against)}\n")
        except ValueError as error:
            problem = error
    if not parts:
        raise problem
    path, text = make_folder(folder) / "differences.md", "\n".join(parts)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def differences_table(group: Group, against: Sequence[str]) -> str:
    """Markdown: a line of the group a row, its mean, and a column of differences for each name in `against`."""
    columns = [{id(d.line): d.text for d in differences(group, name)} for name in against]
    names = [find_line(group, name).name for name in against]
    head = ["method", group.metric, *(f"minus {name}" for name in names)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for line in group.lines:
        values = line.values.get(group.metric)
        if values:
            rows.append([line.name, f"{statistics.mean(values):.2f}", *(c.get(id(line), "") for c in columns)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _by_seed(line: Line, metric: str) -> dict[int, float]:
    scores = {row["seed"]: row["scores"][line.evaluation].get(metric) for row in line.rows}
    return {seed: value for seed, value in scores.items() if value is not None}
