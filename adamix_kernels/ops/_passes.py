"""A trace of what looks at both passes, for the guard that warns of a training without it (models/watch.py)."""

from __future__ import annotations

import torch


class _Looks:
    """count: calls of looked() in this process. compiled: whether one lies in a compiled graph, which counts none."""

    def __init__(self) -> None:
        self.count = 0
        self.compiled = False


LOOKS = _Looks()


def looked() -> None:
    """A batch is doubled, or two passes are compared."""
    if torch.compiler.is_compiling():
        _in_a_graph()
    else:
        LOOKS.count += 1


def _in_a_graph() -> bool:
    """Runs while tracing, and leaves nothing in the graph."""
    LOOKS.compiled = True
    return True


# As torch.compiler.assume_constant_result marks it, which would import the whole compiler with this package.
_in_a_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]
