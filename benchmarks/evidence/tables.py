"""The tables of docs/evidence/README.md, each made from the rows that its marker names.

A table stands between `<!-- table: KIND FILES OPTIONS -->` and `<!-- end of table -->`:

    scores sst2                             every line of the comparison: mean and deviation over the seeds, sizes, cost
    differences sst2 pfeiffer adamix        every line minus these, seed by seed, with 95% intervals
    adds sst2/pfeiffer/adamix two/lora/adamix   a line for each FILES/ONE/ADAMIX: what second pass and mixture add
    runs search                             one line a row
    train train_defaults seed               runs of `adamix train`, by these of their options
    sources sst2 sst2_30_shots              where the rows come from: commits, versions, hours

FILES are names of .jsonl files joined by "+".
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from adamix_kernels.recipes import read_rows
from adamix_kernels.recipes.methods import PASSES, parse_method
from adamix_kernels.recipes.paired import differences, differences_table, find_line
from adamix_kernels.recipes.summary import Group, Line, group_rows
from adamix_kernels.reports.figures import deviation

MARK = re.compile(r"(<!-- table: ([^\n]*?) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def written(text: str, folder: Path) -> str:
    """`text` with every marked table made anew. Raises ValueError for a marker that names no known table or file."""
    return MARK.sub(lambda found: f"{found[1]}\n{table(found[2], folder)}\n\n{found[4]}", text)


def table(order: str, folder: Path) -> str:
    """One table in Markdown, by the words of its marker."""
    kind, *words = order.split()
    if kind not in KINDS:
        raise ValueError(f"table: got {order!r}, expected one of {', '.join(KINDS)} first")
    return KINDS[kind](folder, *words)


def _scores(folder: Path, names: str) -> str:
    group = _group(folder, names)
    metrics = list(dict.fromkeys(name for line in group.lines for name in line.values))
    costs = [_cost(line) for line in group.lines]
    cheapest = min(cost for cost in costs if cost)
    rows = [["method", *metrics, "seeds", "cost of training", "trained", "kept to serve"]]
    for line, steps in zip(group.lines, costs, strict=True):
        cells = [_spread(line.values.get(name, []), 3 if name == "loss" else 2) for name in metrics]
        first = line.rows[0]
        cost = f"{steps / cheapest:.1f}" if steps else ""
        rows.append([line.name, *cells, str(len(line.rows)), cost, f"{first['trained']:,}", f"{first['kept']:,}"])
    return _markdown(rows)


def _differences(folder: Path, names: str, *against: str) -> str:
    return differences_table(_group(folder, names), against)


ADDS = {
    "second pass": ("adamix:num_experts=1", "{one}"), "more steps": ("{longer}", "{one}"),
    "more parameters": ("{wide}", "{one}"),
    "mixture": ("{adamix}", "adamix:num_experts=1"), "mixture, at equal compute": ("{adamix}", "{longer}"),
    "mixture, at equal parameters": ("{adamix}", "{wide}"), "all of it": ("{adamix}", "{one}"),
}  # fmt: skip


def _adds(folder: Path, *comparisons: str) -> str:
    """Of each comparison the differences ADDS, empty where a side has no rows."""
    rows = [["rows", *ADDS]]
    for comparison in comparisons:
        names, one, adamix = comparison.split("/")
        group, longer = _group(folder, names), f"{one}{',' if ':' in one else ':'}times_epochs={PASSES}"
        known = {line.method for line in group.lines}
        alike = {method for method in known if parse_method(method).name == parse_method(one).name}
        wide = min(alike - {one, longer}, default="")  # of the same kind, and neither: the wider one
        cells = []
        for sides in ADDS.values():
            high, low = (side.format(one=one, adamix=adamix, longer=longer, wide=wide) for side in sides)
            found = differences(group, low) if {high, low} <= known else ()
            line = find_line(group, high) if found else None
            cells.append("".join(difference.text for difference in found if difference.line is line))
        rows.append([_what(group), *cells])
    return _markdown(rows)


def _what(group: Group) -> str:
    row = group.lines[0].rows[0]
    return f"{row['data']}, {row['train_rows']:,} rows, {row['epochs']:g} epochs"


def _runs(folder: Path, names: str) -> str:
    rows = [["method", "seed", "metric", "value", "learning rate", "commit"]]
    for row in _rows(folder, names):
        for evaluation, scores in row["scores"].items():
            name = row["method"] + ("" if evaluation == "plain" else f", {evaluation}")
            value = f"{scores[row['metric']]:.1f}"
            rows.append([name, str(row["seed"]), row["metric"], value, f"{row['learning_rate']:g}", _commit(row)])
    return _markdown(rows)


def _train(folder: Path, names: str, *options: str) -> str:
    rows = _rows(folder, names)
    metric = next(iter(rows[0]["scores"]))
    beside = list(dict.fromkeys(name for row in rows for name in row["baselines"]))
    lines = [[*(option.replace("_", " ") for option in options), f"AdaMix, merged: {metric}", *beside]]
    for row in rows:
        words = row["options"].split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        found = [row["scores"], *(row["baselines"].get(name) or {} for name in beside)]
        cells = [f"{scores[metric]:.2f}" if metric in scores else "" for scores in found]
        lines.append([*(given[f"--{option}"] for option in options), *cells])
    return _markdown(lines)


def _sources(folder: Path, *names: str) -> str:
    rows = [["file", "rows", "commit", "torch", "transformers", "hours"]]
    for name in names:
        found = _rows(folder, name)
        seconds = [row.get("seconds") for row in found]
        hours = "" if None in seconds else f"{sum(seconds) / 3600:.1f}"
        versions = [_all(row["versions"][key] for row in found) for key in ("torch", "transformers")]
        rows.append([f"{name}.jsonl", str(len(found)), _all(_commit(row) for row in found), *versions, hours])
    return _markdown(rows)


KINDS: dict[str, Callable[..., str]] = {
    "scores": _scores, "differences": _differences, "adds": _adds, "runs": _runs, "train": _train, "sources": _sources,
}  # fmt: skip


def _rows(folder: Path, names: str) -> list[dict[str, Any]]:
    rows = []
    for name in names.split("+"):
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            raise ValueError(f"table: got {name!r}, expected a file {path}")
        rows += map(_as_drawn_once, read_rows(path))
    return rows


def _as_drawn_once(row: dict[str, Any]) -> dict[str, Any]:
    """A row on the first 1,000 sentences, as the older rows on them: they say that they took 1,000 of sst2."""
    if row.get("data") != "sst2_first_1000":
        return row
    limits = {name: value for name, value in row["identity"]["limits"].items() if name != "rows"}
    return {**row, "data": "sst2", "identity": {**row["identity"], "limits": limits}}


def _group(folder: Path, names: str) -> Group:
    """The one comparison of these files."""
    groups = group_rows(_rows(folder, names))
    if len(groups) != 1:
        raise ValueError(f"table: got rows of {len(groups)} comparisons in {names!r}, expected one")
    return groups[0]


def _cost(line: Line) -> float | None:
    """Steps, each 1.8 times as dear where both passes are made; None where whole weights have gradients."""
    row = line.rows[0]
    if row["method"].startswith("full"):
        return None
    options = dict(parse_method(row["method"]).options)
    weight = options.get("consistency_weight", row["identity"]["recipe"]["adamix"].get("consistency_weight", 0.0))
    steps: float = row["steps"]
    return steps * (PASSES if row["method"].startswith("adamix") and weight else 1.0)


def _commit(row: dict[str, Any]) -> str:
    return row.get("commit") or "not named"


def _all(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
