"""What a person would look at after training: curves, expert usage, merged against single experts."""

from .callback import TrainingReport
from .routings import routing_scores

__all__ = ["TrainingReport", "routing_scores"]
