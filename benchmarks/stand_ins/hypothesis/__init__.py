"""Stands in for hypothesis where it is not installed: a test of drawn cases is skipped, the others of its file run."""

import pytest

from . import strategies

__all__ = ["assume", "given", "settings", "strategies"]


def given(*_, **__):
    """Makes a test that says why it did not run."""

    def decorate(test):
        def skipped():
            pytest.skip("hypothesis is not installed")

        skipped.__name__ = test.__name__
        return skipped

    return decorate


def settings(*_, **__):
    """Leaves the test as it is."""
    return lambda test: test


def assume(condition):
    """What a skipped test will not call."""
    return bool(condition)
