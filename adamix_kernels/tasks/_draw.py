"""Rows drawn by a seed: the same on every machine and Python."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence


def sample_rows(classes: Sequence[Hashable], rows: int, seed: int) -> list[int]:
    """`rows` row numbers without replacement, ascending; each class in proportion, to within one row."""
    members = _members(classes)
    shares = _shares({name: len(found) for name, found in members.items()}, rows)
    generator, chosen = random.Random(seed), []
    for name, found in members.items():
        chosen += generator.sample(found, shares[name])
    return sorted(chosen)


def dev_rows(contents: Sequence[Hashable], classes: Sequence[Hashable], fraction: float, seed: int) -> list[int]:
    """Row numbers of a dev split, ascending: rows of the same content stay together, each class in proportion.

    Every class keeps at least one content in training. Empty where there is too little to divide.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, content in enumerate(contents):
        groups.setdefault(content, []).append(row)
    firsts = [found[0] for found in groups.values()]
    members = _members([classes[row] for row in firsts])
    counts = {name: len(found) for name, found in members.items()}
    limits = {name: count - 1 for name, count in counts.items()}
    shares = _shares(counts, int(len(groups) * fraction + 1e-9), limits)
    generator, every, chosen = random.Random(seed), list(groups.values()), []
    for name, found in members.items():
        for group in generator.sample(found, shares[name]):
            chosen += every[group]
    return sorted(chosen)


def _members(classes: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    members: dict[Hashable, list[int]] = {}
    for row, name in enumerate(classes):
        members.setdefault(name, []).append(row)
    return members


def _shares(
    counts: Mapping[Hashable, int], total: int, limits: Mapping[Hashable, int] | None = None
) -> dict[Hashable, int]:
    """`total` divided in proportion to counts: whole parts first, then the largest remainders, within limits."""
    limits = counts if limits is None else limits
    every = sum(counts.values())
    divided = {name: divmod(total * count, every) for name, count in counts.items()}
    shares = {name: min(whole, limits[name]) for name, (whole, _) in divided.items()}
    order = sorted(counts, key=lambda name: -divided[name][1])
    left = min(total, sum(limits.values())) - sum(shares.values())
    while left > 0:
        for name in order:
            if left > 0 and shares[name] < limits[name]:
                shares[name] += 1
                left -= 1
    return shares
