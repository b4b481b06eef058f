"""The suite's two sizes: that of `make test`, and `make nightly`, which repeats more of the same (ADAMIX_NIGHTLY=1)."""

import itertools
import os

import pytest

NIGHTLY = os.environ.get("ADAMIX_NIGHTLY") == "1"


def pairs(**axes):
    """pytest.mark.parametrize over the product of the axes at night; by day over so few of its cases that every two
    values of two axes still meet in one: a fault of two settings together shows in both sizes."""
    assert len(axes) > 1, "two settings at least"
    return _cases(axes, covering(list(itertools.product(*axes.values())), 2))


def singles(**axes):
    """As pairs, but by day as many cases as the longest axis has values, with the others' in turn: for settings that do
    not meet in the code."""
    lists = [list(values) for values in axes.values()]
    by_day = [tuple(one[n % len(one)] for one in lists) for n in range(max(map(len, lists)))]
    return _cases(axes, by_day)


def _cases(axes, by_day):
    return pytest.mark.parametrize(tuple(axes), list(itertools.product(*axes.values())) if NIGHTLY else by_day)


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
