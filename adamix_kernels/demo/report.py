"""What the demo shows and writes: the table, the plot, the figures."""

from __future__ import annotations

import platform
import statistics
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models._files import write_json
from ..reports.figures import BLUE, GREEN, ORANGE, deviation, mean_curve, pyplot, save_figure, smooth


@dataclass
class MethodResult:
    """One row: dev accuracies in percent by seed, parameters, loss curves; by seed the median seconds of a training
    step and the seconds of all its steps."""

    name: str
    accuracy: list[float] = field(default_factory=list)
    trainable: int = 0
    kept: int = 0
    seconds: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    cross_entropy: list[list[float]] = field(default_factory=list)
    consistency: list[list[float]] = field(default_factory=list)

    def add(self, accuracy: float, curve: Any, model: nn.Module, trainable: int | None = None) -> None:
        """One seed. trainable: parameters in training, where `model` no longer shows them (it is merged)."""
        here = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.accuracy.append(accuracy)
        self.trainable = here if trainable is None else trainable
        self.kept = here
        self.seconds.append(statistics.median(curve.seconds))
        self.training.append(sum(curve.seconds))
        self.cross_entropy.append(curve.cross_entropy)
        self.consistency.append(curve.consistency)

    def extend(self, other: MethodResult) -> None:
        """Adds the seeds of `other`."""
        for name in (each.name for each in fields(self)):
            mine = getattr(self, name)
            if isinstance(mine, list):
                mine += getattr(other, name)

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracy)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds, 0 for one seed."""
        return deviation(self.accuracy)

    @property
    def step(self) -> float:
        return statistics.mean(self.seconds)


def write_table(results: list[MethodResult], seeds: int) -> None:
    """Prints the table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"dev accuracy, mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}")
    table.add_column("method")
    for column in ("accuracy %", "seconds to train", "trained parameters", "kept to serve"):
        table.add_column(column, justify="right")
    for row in results:
        table.add_row(
            row.name,
            f"{row.mean:.1f} ± {row.deviation:.1f}",
            f"{statistics.mean(row.training):.1f}",
            f"{row.trainable:,}",
            f"{row.kept:,}",
        )
    # A pipe has no width of its own; the table must not be cut there.
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def compared(result: MethodResult, others: Sequence[MethodResult]) -> str:
    """ "AdaMix, merged, minus one plain adapter, seed by seed: +1.9, -0.2, +3.1", a line for each of `others`."""
    lines = []
    for other in others:
        each = [f"{mine - theirs:+.1f}" for mine, theirs in zip(result.accuracy, other.accuracy, strict=True)]
        lines.append(f"{result.name}, minus {other.name}, seed by seed: {', '.join(each)}")
    return "\n".join(lines)


def write_plot(results: list[MethodResult], path: Path) -> Path:
    """A PNG: accuracy with its deviation on the left, the losses of AdaMix (the last row) and the plain adapter (the
    second) on the right."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = [textwrap.fill(row.name, 14) for row in results]
    bars = left.bar(names, [r.mean for r in results], yerr=[r.deviation for r in results], capsize=5, color=BLUE)
    left.bar_label(bars, fmt="%.1f", label_type="center", color="white")
    left.set_ylabel("dev accuracy, %")
    left.set_ylim(bottom=max(0.0, min(r.mean - r.deviation for r in results) - 10))
    for row, label, color in ((results[1], "plain adapter", ORANGE), (results[-1], "AdaMix", BLUE)):
        right.plot(smooth(mean_curve(row.cross_entropy)), label=f"{label}: cross-entropy", color=color)
    right.plot(smooth(mean_curve(results[-1].consistency)), label="AdaMix: consistency", color=GREEN)
    right.set_xlabel("step")
    right.set_ylabel("training loss, mean over seeds and 10 steps")
    right.legend()
    return save_figure(figure, path)


def write_results(
    results: list[MethodResult], settings: Any, command: str, seconds: float, jobs: int, path: Path
) -> Path:
    """JSON: the command, versions, settings, and every figure behind the table and the plot.

    jobs: seeds that were trained at a time.
    """
    import transformers

    values = {
        "command": command,
        "seconds": round(seconds, 2),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "jobs": jobs},
        "settings": asdict(settings),
        "methods": [
            {**asdict(r), "accuracy_mean": r.mean, "accuracy_std": r.deviation, "seconds_per_step": r.step}
            for r in results
        ],
    }
    write_json(path, values)
    return path
