"""adamix eval: the scores of a saved run on train, dev or test."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..models.contexts import eval_routing
from ..models.gating import is_learned
from ..models.state import adamix_state
from ..recipes.processes import is_main
from ..routing import LEARNED
from ..tasks import Run, TextSplit, load_split, load_task
from ..tasks._sources import is_file
from ._kinds import checked_metrics, make_kind, warn_of_cuts, written
from ._options import at_least, option, same_file, shows_bars, start
from ._runs import open_run, run_command

logger = logging.getLogger(__name__)


@dataclass
class EvalOptions:
    _argument_group_name = "evaluation"

    data: str | None = option("as in adamix train; what it was trained on, if not given")
    split: Literal["train", "dev", "test"] = option("which part; of another file than the training's, every row", "dev")
    metrics: list[str] = option("as in adamix train", [])
    text_column: str | None = option("where --data has other names than in training")
    text_pair_column: str | None = option("likewise")
    label_column: str | None = option("likewise")
    task_column: str | None = option("likewise, of a run with gates by task")
    routing: Literal["merged", "batch", "sample", "token"] = option(
        "merged experts, or one drawn at random per batch, sample or token", "merged"
    )
    seed: int = option("of random routing", 0)
    batch_size: int = option("texts of a batch", 64)
    max_rows: int | None = option("a sample of so many rows")
    json: bool = option("print one JSON object instead of a sentence", False)


def main(argv: Sequence[str]) -> int:
    where, options, output = run_command(argv, "eval", EvalOptions, "The scores of a saved run.")
    at_least(1, batch_size=options.batch_size, max_rows=options.max_rows)
    start(output)
    opened = open_run(where)
    model, run = opened.model, opened.run
    source = options.data or run.data
    if not source:
        raise ValueError(f"data: got nothing, expected --data: {where.run!r} does not say what it was trained on")
    if not options.data and os.path.isabs(source) and not os.path.exists(source):
        raise FileNotFoundError(
            f"data: {source!r}, what the run was trained on: no such folder or file, expected --data"
        )
    settings, size = run.generation, options.batch_size
    metrics = checked_metrics(run.task, options.metrics)
    kind = make_kind(run.task, run.label_names, opened.tokenizer, run.max_tokens, metrics, settings, size)
    whole = source != run.data and not same_file(source, run.data) and is_file(source)  # what has no parts
    found = _rows(options, run, source)
    rows = found.sample(options.max_rows, 0)
    if torch.cuda.is_available():
        model.cuda()
    torch.manual_seed(options.seed)
    adapted = hasattr(model, "adamix")
    with eval_routing(model, options.routing if adapted else "merged"):
        scores = kind.evaluate(model, rows, shows_bars(output))
    # A merged checkpoint has one expert a side, whatever the routing.
    routing = "merged" if not adapted or adamix_state(model).merged else options.routing
    if adapted and routing == "merged" and not adamix_state(model).merged and is_learned(model):
        routing = LEARNED
    if not is_main():
        return 0
    warn_of_cuts(logger, {"": kind})
    if options.json:
        facts = {"rows": len(rows), "split": "all" if whole else options.split, "data": source, "routing": routing}
        print(json.dumps({**scores.values, **({"missing": scores.missing} if scores.missing else {}), **facts}))
        return 0
    values = ", ".join(written(name, value) for name, value in scores.values.items())
    part = f"{len(rows)} {options.split} texts"
    if whole:
        part = f"all {len(rows)} rows" if len(rows) == len(found) else f"{len(rows)} of all {len(found)} rows"
    print(f"{values} on {part} of {source} ({routing})")
    for name, why in scores.missing.items():
        print(f"{name}: {why}")
    return 0


def _rows(options: EvalOptions, run: Run, source: str) -> TextSplit:
    """Of the training's own data the same split as there; every row of another file, or a split of other data.

    Raises ValueError for a label that the run does not have, or a split that is not there.
    """
    if options.task_column and not run.task_names:
        raise ValueError(f"task_column: got {options.task_column!r}, expected none: this run has no gates by task")
    columns = {name: getattr(options, name) for name in ("text_column", "text_pair_column", "label_column")}
    task_column = options.task_column or run.task_column
    if source != run.data and not same_file(source, run.data):
        return load_split(
            source, options.split, task=run.task, label_names=run.label_names, task_column=task_column,
            task_names=run.task_names, **columns,
        )  # fmt: skip
    known = {name: getattr(options, name) or getattr(run, name) for name in columns}
    task = load_task(source, task=run.task, dev_fraction=run.dev_fraction, task_column=task_column, **known)
    if run.task == "classification" and task.label_names != run.label_names:
        raise ValueError(f"data: {source!r} has the labels {task.label_names}, the run has {run.label_names}")
    if list(task.task_names) != run.task_names:
        raise ValueError(f"data: {source!r} has the tasks {list(task.task_names)}, the run has {run.task_names}")
    split: TextSplit | None = getattr(task, options.split)
    if split is None:
        raise ValueError(f"split: {source!r} has no labelled test split")
    return split
