"""What a person would look at after training: curves, expert usage, merged against single experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .routings import routing_scores

if TYPE_CHECKING:
    from .callback import TrainingReport as TrainingReport

__all__ = ["TrainingReport", "routing_scores"]


def __getattr__(name: str) -> Any:
    """TrainingReport is a callback of transformers, whose Trainer takes a second to import: not for a figure alone."""
    if name != "TrainingReport":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .callback import TrainingReport

    return TrainingReport
