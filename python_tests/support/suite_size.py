"""The suite's two sizes: that of `make test`, and `make nightly`, which repeats more of the same (ADAMIX_NIGHTLY=1)."""

import itertools
import os

import pytest

NIGHTLY = os.environ.get("ADAMIX_NIGHTLY") == "1"


def pairs(**axes):
    """pytest.mark.parametrize over the product of the axes at night; by day over so few of its cases that every two
    values of two axes still meet in one: a fault of two settings together shows in both sizes."""
    return _cases(axes, 2)


def singles(**axes):
    """As pairs, but by day each value of each axis is in one case, whatever beside it: for settings that do not meet in
    the code."""
    return _cases(axes, 1)


def _cases(axes, together):
    assert len(axes) >= together, f"{together} settings at least"
    whole = list(itertools.product(*axes.values()))
    return pytest.mark.parametrize(tuple(axes), whole if NIGHTLY else covering(whole, together))


def covering(cases, together):
    """Some of the cases: the values of every so many places meet as in all. Greedily, each with the most new ones."""
    numbers = [[repr(value) for value in case] for case in cases]
    met = [set(itertools.combinations(enumerate(names), together)) for names in numbers]
    missing, chosen = set().union(*met), []
    while missing:
        best = max(range(len(cases)), key=lambda index: len(met[index] & missing))
        missing -= met[best]
        chosen.append(best)
    return [cases[index] for index in sorted(chosen)]
