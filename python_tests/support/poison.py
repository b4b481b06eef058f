"""Memory that holds NaN until it is written, under the name that the tests know."""

from adamix_kernels.testing import poisoned_memory

__all__ = ["poisoned_memory"]
