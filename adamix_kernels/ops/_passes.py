"""Passes that ride in one batch: rows folded by pass, and a trace of what looks at both (for models/watch.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_unsafe_view = torch.ops.aten._unsafe_view.default


def fold_passes(rows: torch.Tensor, passes: int) -> torch.Tensor:
    """[B, S, H] -> [passes, B/passes * S, H], where every sample of a pass goes to the same expert; 0: as it is."""
    if passes == 0:
        return rows
    batch, tokens, hidden = rows.shape
    return rows.reshape(passes, batch // passes * tokens, hidden)


def by_pass(run: Callable[..., Sequence[torch.Tensor]], *folded: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """run(*arguments) as a function of (*arguments, passes), for indices [passes] where run knows those of samples.

    folded: which arguments are [B, S, ...]; the first of all is. So is the first result, if it has three axes: one
    that was not asked for has one.
    """

    def run_by_pass(*given: Any) -> tuple[torch.Tensor, ...]:
        *arguments, passes = given
        if passes == 0:
            return tuple(run(*arguments))
        batch, tokens, _ = arguments[0].shape
        for n in folded:
            if arguments[n] is not None:
                arguments[n] = fold_passes(arguments[n], passes)
        first, *rest = run(*arguments)
        # Not as a view: models may add to it in place.
        shape = batch, tokens, first.shape[-1]
        return (_unsafe_view(first, shape) if first.dim() == 3 else first, *rest)

    return run_by_pass


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
