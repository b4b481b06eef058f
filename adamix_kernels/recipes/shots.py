"""K-shot draws."""

from __future__ import annotations

import random

from ..tasks import TextSplit


def draw_shots(split: TextSplit, shots: int, seed: int) -> TextSplit:
    """`shots` rows of a split, drawn by the seed, as evenly over the classes as goes; in the split's order.

    Raises ValueError when a class has fewer rows than its share, or there are fewer shots than classes.
    """
    labels = sorted(set(split.labels))
    if shots < len(labels):
        raise ValueError(f"shots: got {shots} for {len(labels)} classes, expected at least one for each")
    generator, chosen = random.Random(seed), []
    for i, label in enumerate(labels):
        rows = [row for row, value in enumerate(split.labels) if value == label]
        share = shots // len(labels) + (i < shots % len(labels))
        if len(rows) < share:
            raise ValueError(f"shots: got {shots}, but label {label} has {len(rows)} training rows, expected {share}")
        chosen += generator.sample(rows, share)
    return split.take(sorted(chosen))
