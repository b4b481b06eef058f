"""Draws that are the same in every process, and whatever else is imported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Hypothesis also draws constants that it finds in the source of imported modules: none of them within."""
    from hypothesis.internal.conjecture import providers

    if not hasattr(providers, "_get_local_constants"):  # before Hypothesis 6.131
        yield
        return
    with mock.patch.object(providers, "_get_local_constants", providers.Constants):
        yield
