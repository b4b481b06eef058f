"""The suite's two sizes: that of `make test`, and `make nightly`, which repeats more of the same (ADAMIX_NIGHTLY=1)."""

import itertools
import os

import pytest

NIGHTLY = os.environ.get("ADAMIX_NIGHTLY") == "1"


def pairs(**axes):
    """pytest.mark.parametrize over the product of the axes at night, else over so few of its cases that every two values
    of two axes still meet in one: a fault of two settings together shows in both sizes."""
    whole = list(itertools.product(*axes.values()))
    return pytest.mark.parametrize(tuple(axes), whole if NIGHTLY else covering(whole))


def covering(cases):
    """Those of the cases in which every pair of values of two places is met, each the first that meets most new ones."""
    numbers = [[repr(value) for value in case] for case in cases]
    met = [set(itertools.combinations(enumerate(names), 2)) for names in numbers]
    missing, chosen = set().union(*met), []
    while missing:
        best = max(range(len(cases)), key=lambda index: len(met[index] & missing))
        missing -= met[best]
        chosen.append(best)
    return [cases[index] for index in sorted(chosen)]
