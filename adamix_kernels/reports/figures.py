"""Panels that the training report, the recipes' plots and the demo share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._extras import needed
from ..models._files import replace_file

BLUE, ORANGE, GREEN, GREY, BLACK = "#4c78a8", "#f58518", "#54a24b", "#9a9a9a", "#333333"


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files."""
    with needed("drawing"):
        import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a PNG in one step and closes the figure."""
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    pyplot().close(figure)
    return path


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Mean of several curves, point by point."""
    return [statistics.mean(values) for values in zip(*curves)]


def smooth(values: Sequence[float], window: int = 10) -> list[float]:
    """Mean of the last `window` points, fewer at the beginning."""
    return [statistics.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation, 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def draw_curves(
    axes: Any, steps: Sequence[float | None], curves: Mapping[str, Sequence[float | None]], ylabel: str
) -> None:
    """Lines by name over steps; a curve that is None at a step has a gap there."""
    for (name, values), color in zip(curves.items(), (GREY, BLUE, GREEN, ORANGE, BLACK)):
        axes.plot(steps, [math.nan if v is None else v for v in values], label=name, color=color)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.legend()


def draw_usage(axes: Any, shares: Sequence[Sequence[float]]) -> None:
    """A row a layer, a column an expert, the share of the layer's draws in each field."""
    experts = len(shares[0])
    darkest = max(2 / experts, max(map(max, shares)))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
    for layer, row in enumerate(shares):
        for expert, share in enumerate(row):
            color = "white" if share > 0.6 * darkest else "black"
            axes.text(expert, layer, f"{100 * share:.0f}%", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(experts))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title("share of the training draws")


def draw_routings(axes: Any, groups: Mapping[str, Sequence[float]], merged: Sequence[float], name: str) -> None:
    """A violin a group (random routing, single experts), with its points; the merged experts as a line, their mean."""
    groups = {label: [v for v in values if v is not None and math.isfinite(v)] for label, values in groups.items()}
    groups = {label: values for label, values in groups.items() if values}
    places = list(range(1, len(groups) + 1))
    if groups:
        bodies = axes.violinplot(list(groups.values()), places, showmeans=True)["bodies"]
        for body, color in zip(bodies, (ORANGE, GREY)):
            body.set_facecolor(color)
        for place, values in zip(places, groups.values()):
            axes.scatter([place] * len(values), values, s=9, color="black", zorder=3)
    merged = [v for v in merged if v is not None and math.isfinite(v)]
    if merged:
        axes.axhline(statistics.mean(merged), color=BLUE, linewidth=2, label="merged")
        axes.legend()
    axes.set_xticks(places, list(groups))
    axes.set_ylabel(name)
