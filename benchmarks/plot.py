"""`python -m benchmarks.plot`: pictures of the measurements, drawn from the CSVs alone: speed-ups and rooflines."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, zip_longest
from pathlib import Path

from adamix_kernels.models._files import replace_file

from .measure import goals, record
from .measure.goal_sources import OURS
from .measure.record import Row
from .models.names import ADAMIX, TITLES

BLUE, GREY, ORANGE = "#3b6fb6", "#9aa3ad", "#d9822b"
# The key under which a picture keeps the digest of the rows it shows.
KEY = "Description"


@dataclass(frozen=True)
class Bar:
    """How many times as fast as `label` we are: the median, and its spread if it was kept."""

    group: str
    label: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """A contender under its roofs: operations a byte, operations a second."""

    op: str
    backend: str
    intensity: float
    throughput: float


def paired_bars(rows: Sequence[Row]) -> list[Bar]:
    """What was timed in turns, the AdaMix step or an op: the inverse of ours over another's, "ratio_p50 to <other>"."""
    ours = [r for r in rows if r.op == f"step/{ADAMIX}" or not r.op.startswith("step/")]
    found = {(r.op, r.shape, r.metric): r.value for r in ours}
    bars = []
    for (op, shape, metric), value in found.items():
        if not metric.startswith("ratio_p50 to "):
            continue
        other = metric.removeprefix("ratio_p50 to ")
        low, high = (found.get((op, shape, f"ratio_{p} to {other}")) for p in ("p80", "p20"))
        title = TITLES.get(other.removeprefix("step/"), other)
        spread = (None, None) if low is None or high is None else (1 / low, 1 / high)
        bars.append(Bar(shape if op.startswith("step/") else f"{op}, {shape}", title, 1 / value, *spread))
    return bars


def op_bars(rows: Sequence[Row]) -> list[Bar]:
    """Ops and whole steps: time of each peer over that of our fastest backend, eager; an op forward and backward."""
    ours: dict[str, float] = {}
    peers: dict[str, dict[str, float]] = {}
    with_gradients = {r.op.partition("/")[0] for r in rows if r.op.endswith("/both")}
    for r in rows:
        op, _, rest = r.op.partition("/")
        if r.metric != "time_p50" or op == "inference" or (op in with_gradients and rest != "both"):
            continue
        name, mine = r.backend, r.backend in OURS
        if op == "step":
            name, _, rest = rest.partition("/")
            mine = name == ADAMIX
        group = f"{op} {rest}, {r.shape}, {r.dtype}"
        if mine:
            ours[group] = min(r.value, ours.get(group, r.value))
        else:
            peers.setdefault(group, {})[name] = r.value
    return [
        Bar(group, name, time / ours[group])
        for group, by_name in peers.items() if group in ours for name, time in by_name.items()
    ]  # fmt: skip


def points(rows: Sequence[Row]) -> tuple[list[Point], float, float]:
    """(points, copy bandwidth in bytes a second, matrix product in operations a second: the fastest dtype's)."""
    values = {(r.op, r.backend, r.shape, r.dtype, r.metric): r.value for r in rows}
    made = []
    for (op, backend, shape, dtype, metric), value in values.items():
        moved = values.get((op, backend, shape, dtype, "bandwidth"))
        if metric == "throughput" and moved and not op.startswith("ceiling/"):
            made.append(Point(op, backend, value * 1e12 / (moved * 1e9), value * 1e12))
    copy = [r.value * 1e9 for r in rows if r.op == "ceiling/copy"]
    product = [r.value * 1e12 for r in rows if r.op == "ceiling/matmul"]
    return made, max(copy, default=0.0), max(product, default=0.0)


def draw(path: Path) -> list[Path]:
    """The pictures of one CSV, beside it; only those it has rows for."""
    rows, stem = record.read(path), path.with_suffix("")
    made = []
    bars = paired_bars(rows) or op_bars(rows)
    # Times taken one after the other give way to those taken in turns.
    if bars and not path.with_name(f"{path.stem}_paired.csv").exists():
        made.append(save(_speedups(bars, _where(rows)), Path(f"{stem}_speedup.png"), rows))
    scattered, copy, product = points(rows)
    if scattered and copy and product:
        made.append(save(_roofline(scattered, copy, product, _where(rows)), Path(f"{stem}_roofline.png"), rows))
    return made


def pictures(path: Path) -> list[Path]:
    """Those that `draw` made of one CSV and that are there."""
    stem = path.with_suffix("")
    return [p for p in (Path(f"{stem}_speedup.png"), Path(f"{stem}_roofline.png")) if p.exists()]


def digest(rows: Sequence) -> str:
    """Of what a picture is drawn from."""
    return hashlib.sha256(repr(list(rows)).encode()).hexdigest()


def digest_in(picture: Path) -> str:
    """The digest that a picture keeps."""
    from PIL import Image

    with Image.open(picture) as image:
        return image.text.get(KEY, "")


def _where(rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"{first.gpu_name or first.cpu_name}, torch {first.torch}, {first.date[:10]}, commit {first.commit}"


def _speedups(bars: Sequence[Bar], where: str):
    plt = pyplot()
    groups = list(dict.fromkeys(bar.group for bar in bars))
    across = 1 if len(groups) < 4 else 2
    lines = [groups[at : at + across] for at in range(0, len(groups), across)]
    longest = [max(sum(b.group == g for b in bars) for g in line) for line in lines]
    figure, axes = plt.subplots(
        len(lines), across, figsize=(8 if across == 1 else 12, sum(0.9 + 0.32 * n for n in longest)),
        sharex=True, squeeze=False, layout="constrained", height_ratios=[1 + n for n in longest],
    )  # fmt: skip
    for axis, group in zip_longest(axes.flat, groups):
        if group is None:
            axis.set_visible(False)
            continue
        shown = [bar for bar in bars if bar.group == group][::-1]
        axis.barh([b.label for b in shown], [b.value for b in shown], color=BLUE, height=0.6)
        for place, bar in enumerate(shown):
            if bar.low is not None:
                axis.plot([bar.low, bar.high], [place, place], color="black", linewidth=1)
            axis.annotate(
                f"{bar.value:.2f}x", (max(bar.value, bar.high or 0), place), (4, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
        axis.axvline(1, color=GREY, linewidth=1)
        axis.set_title(group, loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.1)
    figure.supxlabel("times as fast as this (right of 1: we are faster); line: 20th to 80th percentile", fontsize=8)
    figure.suptitle(where, fontsize=8, color="#555555")
    return figure


def _roofline(scattered: Sequence[Point], copy: float, product: float, where: str):
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    left, right = min(p.intensity for p in scattered) / 3, max(max(p.intensity for p in scattered), product / copy) * 3
    corner = product / copy
    axis.plot([left, corner, right], [left * copy, product, product], color="black", linewidth=1.2)
    # Where a kernel of ours ran, the plain PyTorch backend is one more peer.
    kernels = {p.backend for p in scattered}.intersection(OURS[1:]) or OURS
    peers = [p for p in scattered if p.backend not in kernels]
    axis.scatter([p.intensity for p in peers], [p.throughput for p in peers], s=10, color=GREY, label="peers")
    by_op: dict[str, list[Point]] = {}
    for p in scattered:
        if p.backend in kernels:
            by_op.setdefault(p.op.partition("/")[0], []).append(p)
    for (op, mine), marker in zip(by_op.items(), cycle("os^DvPX*<>"), strict=False):
        axis.scatter(
            [p.intensity for p in mine], [p.throughput for p in mine], s=30, marker=marker, color=ORANGE,
            edgecolors="black", linewidths=0.4, label=f"{op}, ours",
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="operations a second")
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    axis.set_title(f"{where}; roofs measured: {copy / 1e9:.0f} GB/s, {product / 1e12:.3g} TFLOP/s", fontsize=8)
    return figure


def pyplot():
    """matplotlib.pyplot, drawing into files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure, path: Path, rows: Sequence) -> Path:
    """Writes a picture that keeps the digest of its rows, whole or not at all."""
    try:
        replace_file(path, lambda part: figure.savefig(part, format="png", dpi=110, metadata={KEY: digest(rows)}))
    finally:
        pyplot().close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", nargs="*", type=Path, help="default: every CSV of benchmarks/results with whole figures")
    options = parser.parse_args(arguments)
    for path in options.csv or measured():
        for picture in draw(path):
            print(picture)
    return 0


def measured(folder: Path = goals.RESULTS) -> list[Path]:
    """The CSVs under `folder` that a picture is drawn of: not those with medians alone, nor those of mixtures."""
    found = [path for path in sorted(folder.rglob("*.csv")) if record.has_schema(path)]
    timed = ((path, [r for r in record.read(path) if r.metric == "time_p50"]) for path in found)
    return [path for path, rows in timed if any(not r.op.startswith("mixture") for r in rows)]


if __name__ == "__main__":
    sys.exit(main())
