"""The table and the plots that come out of result rows."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models._files import make_folder, replace_file
from ..reports.figures import BLUE, ORANGE, deviation, draw_routings, mean_curve, pyplot, save_figure

NAMES = {"plain": "", "gates": "gated", "merged": "merged", "random": "random routing", "fixed": "one fixed expert"}


@dataclass
class Line:
    """One line of a table: a method in one evaluation, every seed's value of each metric."""

    method: str
    evaluation: str
    values: dict[str, list[float]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.method, NAMES.get(self.evaluation, self.evaluation))))


@dataclass
class Group:
    """Rows that are comparable: one recipe, on the same data, rows, shots and epochs."""

    title: str
    metric: str
    lines: list[Line]
    skipped: dict[str, str]
    missing: dict[str, str]


def group_rows(rows: Sequence[dict[str, Any]]) -> list[Group]:
    """Rows by what must be equal for a comparison, each group's lines in order of appearance."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        limits = row["identity"]["limits"]
        key = (row["recipe"], row["model"], row["data"], row["epochs"], row["batch"], row["shots"])
        settings.setdefault((*key, limits["train_rows"], limits["dev_rows"], limits.get("rows")), []).append(row)
    return [_group(key, members) for key, members in settings.items()]


def markdown(groups: Sequence[Group]) -> str:
    """Markdown: a heading and a table a group; mean ± sample deviation over the seeds."""
    parts = []
    for group in groups:
        metrics = list(dict.fromkeys(name for line in group.lines for name in line.values))
        head = ["method", *metrics, "seeds", "trained", "kept to serve", "seconds a step"]
        lines = [head, ["---", *["---:"] * (len(head) - 1)]]
        for line in group.lines:
            first = line.rows[0]
            step = statistics.median(r["seconds_per_step"] for r in line.rows if r["seconds_per_step"] is not None)
            cells = [_mean_and_deviation(line.values.get(name, [])) for name in metrics]
            lines.append(
                [line.name, *cells, str(len(line.rows)), f"{first['trained']:,}", f"{first['kept']:,}", f"{step:.3f}"]
            )
        notes = [f"{name}: not run, {why}." for name, why in group.skipped.items()]
        notes += [f"{name}: no score, {why}." for name, why in group.missing.items()]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        parts.append("\n\n".join(filter(None, (f"### {group.title}", table, "\n".join(notes)))))
    return "\n\n".join(parts) + "\n"


def write_summary(rows: Sequence[dict[str, Any]], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes table.md and, for each group, methods-N.png, routings-N.png and losses-N.png; returns what it wrote.

    routings is the paper's violin plot: single experts and random routing of all seeds, the merged experts as a line.
    A picture for which the rows have nothing is left out. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("results: got no rows, expected at least one finished run")
    folder = make_folder(folder)
    groups = group_rows(rows)
    table, text = folder / "table.md", markdown(groups)
    replace_file(table, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    written = [table]
    for number, group in enumerate(groups, start=1):
        for stem, draw in (("methods", methods_figure), ("routings", _routings), ("losses", _losses)):
            figure = draw(group)
            if figure is not None:
                written.append(save_figure(figure, folder / f"{stem}-{number}.png"))
    return written


def _group(key: tuple[Any, ...], rows: list[dict[str, Any]]) -> Group:
    recipe, model, data, epochs, batch, shots, train_rows, dev_rows, drawn = key
    lines: dict[tuple[str, str], Line] = {}
    skipped: dict[str, str] = {}
    missing: dict[str, Any] = {}
    for row in rows:
        if "skipped" in row:
            skipped[row["method"]] = row["skipped"]
            continue
        missing |= row["metrics_missing"]
        for evaluation, scores in sorted(row["scores"].items(), key=lambda item: list(NAMES).index(item[0])):
            line = lines.setdefault((row["method"], evaluation), Line(row["method"], evaluation))
            line.rows.append(row)
            for name, value in scores.items():
                line.values.setdefault(name, []).append(value)
    which = "" if drawn else "the first "
    amount = f"{shots} shots" if shots else f"{which}{train_rows} training rows" if train_rows else "all training rows"
    measured = f"{which}{dev_rows}" if dev_rows else "all"
    passes = f"{epochs:g} epoch" + ("" if epochs == 1 else "s")
    title = f"{recipe}: {model} on {data}, {amount}, {measured} dev rows, {passes}, batch {batch}"
    return Group(title, rows[0]["metric"], list(lines.values()), skipped, missing)


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.2f} ± {deviation(values):.2f}"


def methods_figure(group: Group) -> Any:
    """A bar a line of the comparison: mean and deviation of its first metric; None where no line has that."""
    lines = [line for line in group.lines if line.values.get(group.metric)]
    if not lines:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 1 + 0.4 * len(lines)), layout="constrained")
    means = [statistics.mean(line.values[group.metric]) for line in lines]
    errors = [deviation(line.values[group.metric]) for line in lines]
    colors = [
        BLUE if line.evaluation == "merged" else "#9ecae9" if line.evaluation != "plain" else ORANGE for line in lines
    ]
    bars = axes.barh([line.name for line in lines], means, xerr=errors, color=colors, capsize=3)
    axes.bar_label(bars, fmt="%.1f", label_type="center", color="white")
    axes.invert_yaxis()
    axes.set_xlim(left=max(0.0, min(m - e for m, e in zip(means, errors)) - 5))
    axes.set_xlabel(f"{group.metric}, mean and deviation over the seeds")
    axes.set_title(group.title, fontsize=8, loc="left", wrap=True)
    return figure


def _routings(group: Group) -> Any:
    """One panel a method that has several experts."""
    merged = [line for line in group.lines if line.evaluation == "merged" and any(r["spread"] for r in line.rows)]
    if not merged:
        return None
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(merged), figsize=(1 + 3 * len(merged), 4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, line in zip(panels[0], merged):
        spread: dict[str, Sequence[float]] = {
            name: [v for row in line.rows for v in row["spread"].get(key, [])]
            for key, name in (("random", "random routing"), ("fixed", "one expert"))
        }
        draw_routings(axes, spread, line.values.get(group.metric, []), group.metric)
        axes.set_title(line.method, fontsize=8, wrap=True)
    return figure


def _losses(group: Group) -> Any:
    """Training loss of every method, mean over the seeds; of AdaMix the cross-entropy, and the consistency dashed."""
    once = {line.method: line for line in group.lines}
    curves = {m: [r["history"] for r in line.rows if r["history"].get("step")] for m, line in once.items()}
    curves = {method: histories for method, histories in curves.items() if histories}
    if not curves:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for method, histories in curves.items():
        steps = histories[0]["step"]
        name = "cross_entropy" if "cross_entropy" in histories[0] else "loss"
        (drawn,) = axes.plot(steps, mean_curve([h[name] for h in histories]), label=method)
        consistency = mean_curve([h.get("consistency", []) for h in histories])
        if any(consistency):
            axes.plot(steps, consistency, linestyle="--", color=drawn.get_color())
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy in training (dashed: consistency)")
    axes.legend(fontsize=7)
    axes.set_title(group.title, fontsize=8, loc="left", wrap=True)
    return figure
