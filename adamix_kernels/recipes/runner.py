"""Every method on every seed of a recipe, finished rows left alone."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._scratch import temporary_folder
from . import processes
from .commits import commit
from .config import NUMBERS, Recipe
from .methods import Method, check_available, learning_rate
from .problems import PROBLEMS
from .problems import Limits as Limits
from .results import append_row, read_rows, row_key

logger = logging.getLogger(__name__)


def run_recipe(
    recipe: Recipe,
    methods: Sequence[Method],
    seeds: Sequence[int],
    results: str | os.PathLike[str],
    *,
    limits: Limits | None = None,
    reports: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Runs what `results` does not hold yet, appends a row after each run, and returns all rows asked for.

    Args:
        results: a JSON-lines file; a row there with the same recipe, method, seed and limits is not run again.
        reports: a folder for a TrainingReport of every AdaMix run.
        progress: a bar over the runs.

    In a launch of several processes all train together, as one run of a batch as many times as large, which is a run of
    its own (the row's `processes`); the first process alone reads and writes `results` and shows the bar.

    A method that cannot run on this recipe (NotImplementedError) leaves a row whose `skipped` says why, and is tried
    again the next time. Seeds run in the outer loop, so that an interrupted run has compared all methods on the same
    seeds.

    Raises ValueError for a recipe whose training has no learning rate, epochs or batch.
    """
    from tqdm.auto import tqdm

    limits = Limits() if limits is None else limits
    absent = [name for name in NUMBERS if name not in recipe.training]
    if absent:
        raise ValueError(f"training: got no {absent[0]}, expected {', '.join(NUMBERS)} in it")
    processes.join(bool(recipe.training.get("use_cpu", False)))
    done = processes.agree({row.get("key"): row for row in read_rows(results)} if processes.is_main() else {})
    wanted = [(seed, method, run_identity(recipe, method, seed, limits)) for seed in seeds for method in methods]
    rows = []
    problem = functools.cache(lambda: PROBLEMS[recipe.kind](recipe, limits))
    for seed, method, identity in tqdm(wanted, unit="run", disable=not (progress and processes.is_main())):
        key = row_key(identity)
        before = done.get(key)
        if before is None or "skipped" in before:
            row = {"key": key, **_labels(recipe, method, seed, limits), "identity": identity}
            start = time.perf_counter()
            row |= _outcome(recipe, problem, method, seed, reports)
            row["seconds"] = round(time.perf_counter() - start, 2)
            if processes.is_main() and (before is None or before["skipped"] != row.get("skipped")):
                append_row(results, row)
            done[key] = processes.agree(row)
        rows.append(done[key])
    return rows


def run_identity(recipe: Recipe, method: Method, seed: int, limits: Limits) -> dict[str, Any]:
    """What makes a run itself: what its outcome depends on. Other methods' settings and seeds are no part of it."""
    values, amounts = recipe.to_dict(), asdict(limits)
    if limits.train_rows is not None or limits.dev_rows is not None:
        amounts["rows"] = "drawn"  # rows of earlier releases took the first ones
    for name in ("methods", "default_methods", "seeds", "source"):
        del values[name]
    for name in ("minimum", "model_config"):  # newer than the first rows
        if not values[name] and values[name] != 0:
            del values[name]
    several = {"processes": processes.count()} if processes.count() > 1 else {}
    return {
        **several,
        "recipe": values,
        "method": str(method),
        "settings": recipe.methods.get(method.name, {}),
        "seed": seed,
        "limits": amounts,
    }


def _labels(recipe: Recipe, method: Method, seed: int, limits: Limits) -> dict[str, Any]:
    training = recipe.training
    return {
        "recipe": recipe.name,
        "method": str(method),
        "seed": seed,
        "data": recipe.data,
        "model": recipe.model,
        "metric": recipe.metrics[0],
        "epochs": training["num_train_epochs"],
        "batch": training["per_device_train_batch_size"],
        "learning_rate": learning_rate(method, recipe),
        "shots": limits.shots or recipe.shots,
        "dev_rows": limits.dev_rows,
        "processes": processes.count(),
        "commit": commit(),
        "versions": versions(),
    }


def _outcome(
    recipe: Recipe, problem: Callable[[], Any], method: Method, seed: int, reports: str | os.PathLike[str] | None
) -> dict[str, Any]:
    from .training import train_once

    report = None
    if reports is not None:
        name = f"{recipe.name}-{method}-{seed}".replace("/", "_").replace(":", "_").replace(",", "_")
        report = Path(reports) / name
    try:
        check_available(method, recipe)
        with _shared_folder() as folder:
            return train_once(recipe, problem(), method, seed, folder, report)
    except NotImplementedError as error:
        logger.warning("%s on %s: %s", method, recipe.name, error)
        return {"skipped": str(error)}


@contextlib.contextmanager
def _shared_folder() -> Iterator[Path]:
    """A temporary folder, the same in all processes of a machine."""
    if not processes.is_main():
        yield Path(processes.agree(""))
        return
    with temporary_folder("adamix_recipe_") as folder:
        yield Path(processes.agree(str(folder)))


def versions() -> dict[str, str]:
    """Of what a row's outcome depends on: this package, torch, transformers."""
    import torch
    import transformers

    from .._version import __version__

    return {"adamix_kernels": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
