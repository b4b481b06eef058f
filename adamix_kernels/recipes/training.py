"""One run: a method on a recipe with one seed, by transformers' Trainer or AdaMixTrainer."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..models.config import AdaMixConfig
from ..models.contexts import eval_routing, use_experts
from ..models.merging import merge
from ..models.state import adamix_state
from ..models.trainer import AdaMixTrainer
from ..reports import TrainingReport
from ..tasks.generation import labels_for
from . import processes
from .config import Recipe
from .methods import Built, Method, build, epochs, kept_parameters, learning_rate, warmup
from .metrics import Scores
from .together import Together

LOGS = 40  # about as many points of a curve as a row keeps
DRAWS = 3  # random routings that an evaluation averages


def train_once(
    recipe: Recipe, problem: Any, method: Method, seed: int, folder: Path, report: Path | None = None
) -> dict[str, Any]:
    """Trains and evaluates; returns the outcome part of a row, as JSON would have it.

    The seed fixes the head's first weights, the order of the batches and what is drawn after them: the same for every
    method as far as it draws the same numbers.

    Args:
        folder: scratch space for checkpoints. report: a folder for an AdaMix run's TrainingReport.
    """
    logs: list[dict[str, Any]] = []
    seconds: list[float] = []
    learnt: list[dict[str, torch.Tensor]] = []
    steps = 0
    for member in range(_members(method, recipe)):
        set_seed(seed)
        built = build(method, problem.fresh(), recipe)
        rows = problem.train_rows(seed)
        trainer, number = _trainer(recipe, problem, method, built, rows, (seed, member), folder / str(member), report)
        timer = _Timer()
        trainer.add_callback(timer)
        trainer.train()
        steps += number
        seconds += timer.seconds
        logs = logs or trainer.state.log_history
        if method.name == "soup":
            learnt.append({n: p.detach().clone() for n, p in built.model.named_parameters() if p.requires_grad})
    built.members = learnt
    trained = max(1, len(learnt)) * sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    kept = kept_parameters(built)
    start = time.perf_counter()
    scores, details = evaluate(recipe, problem, built, seed)
    return {
        "scores": scores,
        **details,
        "trained": trained,
        "kept": kept,
        "steps": steps,
        "train_rows": len(rows),
        "seconds_per_step": round(statistics.median(seconds), 4) if seconds else None,
        "evaluation_seconds": round(time.perf_counter() - start, 2),
        "history": _history(logs),
    }


def _members(method: Method, recipe: Recipe) -> int:
    """Models that a run trains."""
    if method.name != "soup":
        return 1
    return method.members or max(2, AdaMixConfig.from_dict(dict(recipe.adamix)).num_experts)


def _trainer(
    recipe: Recipe,
    problem: Any,
    method: Method,
    built: Built,
    rows: list[dict[str, Any]],
    draw: tuple[int, int],
    folder: Path,
    report: Path | None,
) -> tuple[Any, int]:
    """(trainer, steps). draw: (seed, member of a soup), which order the batches."""
    seed, member = draw
    problem.check(built.model, rows)
    arguments, steps = training_arguments(recipe, method, seed + 1000 * member, len(rows), folder)
    callbacks: list[TrainerCallback] = []
    if report is not None and built.experts:
        first = recipe.metrics[0]
        score = None if recipe.kind == "generation" else lambda m: problem.scores(m).values.get(first, math.nan)
        callbacks.append(TrainingReport(report, score=score, score_name=first))
    together = dict(method.options).get("together")
    if together is not None:
        callbacks.append(Together(max(1, round(together * steps))))
    best = recipe.select == "best"
    more: dict[str, Any] = {} if built.adapted else {"compute_loss_func": problem.loss}
    if best:
        more["compute_metrics"] = _metric(problem)
    collate = problem.collate
    if built.adapted:  # the others' loss is problem.loss
        collate = labels_for(built.model, collate)
    trainer = (AdaMixTrainer if built.adapted else Trainer)(
        model=built.model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=problem.dev_rows() if best else None,
        data_collator=collate,
        callbacks=callbacks,
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, steps


def training_arguments(
    recipe: Recipe, method: Method, seed: int, rows: int, folder: Path
) -> tuple[TrainingArguments, int]:
    """(arguments, steps) of one run; warmup_ratio becomes steps, which every release of transformers understands.

    Raises ValueError for a field that TrainingArguments has not.
    """
    rate, passes = learning_rate(method, recipe), epochs(method, recipe)
    values = {**recipe.training, "learning_rate": rate, "num_train_epochs": passes, **warmup(method)}
    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} | {"warmup_ratio"}
    unknown = next((name for name in values if name not in known), None)
    if unknown is not None:
        raise ValueError(f"training: got {unknown!r}, expected fields of TrainingArguments, or warmup_ratio")
    batch = values["per_device_train_batch_size"] * processes.count()
    steps = math.ceil(values["num_train_epochs"] * math.ceil(rows / batch))
    if "warmup_ratio" in values:
        values["warmup_steps"] = math.ceil(values.pop("warmup_ratio") * steps)
    if processes.on_cpus(values.get("use_cpu", False)):
        values["use_cpu"] = True
    strategy = "epoch" if recipe.select == "best" else "no"
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        report_to="none",
        logging_steps=max(1, steps // LOGS),
        save_strategy=strategy,
        eval_strategy=strategy,
        save_total_limit=1,
        load_best_model_at_end=recipe.select == "best",
        metric_for_best_model=recipe.metrics[0] if recipe.select == "best" else None,
        greater_is_better=True if recipe.select == "best" else None,
        **{"disable_tqdm": True, "dataloader_pin_memory": torch.cuda.is_available(), **values},
    )
    return arguments, steps


def evaluate(recipe: Recipe, problem: Any, built: Built, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """({evaluation: {metric: value}}, details): of one model "plain", of an AdaMix model as the recipe asks.

    Of learned gates: "gates", the experts weighed by them, and "merged" by the mean gates where the recipe asks for it.
    "random" is the mean over DRAWS routings per sample; "fixed" the mean over the experts (or a soup's models), each by
    itself. Their single values of the first metric are in details["spread"].
    """
    model = built.model.eval()
    if built.members:
        return _evaluate_soup(recipe, problem, built)
    if not built.experts:
        scores = problem.scores(model)
        return {"plain": scores.values}, _details(scores)
    values: dict[str, Any] = {}
    if built.gates:
        values["gates"] = (scores := problem.scores(model)).values
        if "merged" in recipe.evaluations:
            values["merged"] = problem.scores(merge(model, gates="mean").eval()).values
        return values, {**_details(scores), "spread": {}}
    spread: dict[str, list[float | None]] = {}
    scores = Scores()

    def note(name: str, runs: list[Scores]) -> None:
        values[name], spread[name] = _mean(runs), [run.values.get(recipe.metrics[0]) for run in runs]

    if "random" in recipe.evaluations:
        runs = []
        for draw in range(DRAWS):
            torch.manual_seed(1000 * seed + draw)
            with eval_routing(model, "sample"):
                runs.append(scores := problem.scores(model))
        note("random", runs)
    if "fixed" in recipe.evaluations:
        runs = []
        for expert in range(adamix_state(model).config.num_experts):
            with use_experts(model, expert):
                runs.append(scores := problem.scores(model))
        note("fixed", runs)
    if "merged" in recipe.evaluations:
        scores = problem.scores(merge(model).eval())
        values = {"merged": scores.values, **values}
    return values, {**_details(scores), "spread": spread}


def _evaluate_soup(recipe: Recipe, problem: Any, built: Built) -> tuple[dict[str, Any], dict[str, Any]]:
    """ "merged": the mean of the members' weights. "fixed", where the recipe asks for it: each member alone."""
    runs = []
    for state in built.members if "fixed" in recipe.evaluations else ():
        built.model.load_state_dict(state, strict=False)
        runs.append(problem.scores(built.model))
    means = {name: torch.stack([m[name] for m in built.members]).mean(0) for name in built.members[0]}
    built.model.load_state_dict(means, strict=False)
    scores = problem.scores(built.model)
    values = {"merged": scores.values, **({"fixed": _mean(runs)} if runs else {})}
    spread = {"fixed": [run.values.get(recipe.metrics[0]) for run in runs]} if runs else {}
    return values, {**_details(scores), "spread": spread}


def _mean(runs: list[Scores]) -> dict[str, float]:
    names = set.intersection(*(set(run.values) for run in runs))
    return {name: statistics.mean(run.values[name] for run in runs) for name in sorted(names)}


def _details(scores: Scores) -> dict[str, Any]:
    return {"metric_sources": scores.sources, "metrics_missing": scores.missing}


def _metric(problem: Any) -> Callable[[Any], dict[str, float]]:
    """compute_metrics of Trainer: the first metric alone, 0 where its library is missing or it is not defined."""
    name = problem.recipe.metrics[0]

    def metrics(prediction: Any) -> dict[str, float]:
        scores = problem.scores_of(torch.as_tensor(prediction.predictions), prediction.label_ids.tolist())
        return {name: scores.values.get(name, 0.0)}

    return metrics


def _history(logs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """step, loss and, of AdaMix, cross_entropy and consistency of every training log."""
    logs = [log for log in logs if "loss" in log and "learning_rate" in log]
    names = [n for n in ("step", "loss", "cross_entropy", "consistency") if logs and n in logs[0]]
    return {name: [round(log[name], 6) for log in logs] for name in names}


class _Timer(TrainerCallback):
    """Seconds of each step, from its first forward to the optimizer's end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
