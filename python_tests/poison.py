"""Memory that holds NaN until it is written."""

import contextlib

import torch


@contextlib.contextmanager
def poisoned_memory(poison=True):
    """Everything that is allocated without a value holds NaN, in C++ too."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(poison or before[0], warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
