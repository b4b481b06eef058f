"""adamix train: AdaMixTrainer on texts, with every flag of transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.inject import adapt
from ..tasks import Run, TextTask, load_causal, load_classifier, load_task, resolve_model, write_run
from ._baselines import Baselines, Work, measure
from ._kinds import Kind, checked_metrics, longest_text, make_kind, start_at, without_text
from ._options import is_main_process, quiet, set_log_level
from ._parser import OptionParser
from ._train_options import SHOWN, AdaptationOptions, DataOptions, FitOptions, check_amounts

# Where they differ from TrainingArguments'; a flag or a file overrides each.
DEFAULTS = {
    "output_dir": "adamix_out",
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 20,
    "report_to": "none",
}
LOGS = 4  # lines of training loss in a run shorter than logging_steps


@dataclass
class Options:
    """arguments: TrainingArguments. given: names of the options that the user set."""

    data: DataOptions
    adaptation: AdaptationOptions
    fit: FitOptions
    arguments: Any
    given: frozenset[str]


def parse(argv: Sequence[str]) -> Options:
    """Flags, or a JSON or YAML file of them. Raises ValueError for what is no option or no value of one."""
    from transformers import TrainingArguments

    theirs = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    parser = OptionParser(
        "train",
        (DataOptions, AdaptationOptions, FitOptions, TrainingArguments),
        "Fine-tune a model with AdaMix on texts: classification, regression, or generation. Flags may stand in a JSON "
        "or YAML file: adamix train FILE, or --config FILE beside flags, which come first.",
        hidden=theirs,
        shown=SHOWN,
        hidden_title="the Trainer's (transformers' TrainingArguments; --help_all shows the rest)",
        defaults={**DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available()},
        aliases={"out": "output_dir"},
    )
    flags = list(argv)
    parsed = parser.parse(flags)
    data, adaptation, fit, arguments = parsed.parts
    check_amounts(data, fit)
    if fit.early_stopping:
        when = str(arguments.eval_strategy.value), str(arguments.save_strategy.value)
        if when[0] == "no" or when[1] not in (when[0], "best"):
            raise ValueError(
                f"early_stopping: got --eval_strategy {when[0]} and --save_strategy {when[1]}, expected epoch or "
                "steps, the same for both"
            )
        arguments = dataclasses.replace(arguments, load_best_model_at_end=True)
    return Options(data, adaptation, fit, arguments, parsed.given)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    arguments, data, fit = options.arguments, options.data, options.fit
    import transformers

    from ._fit import checkpoint_of, run_training
    from ._report import Outcome, tell

    set_log_level(logging.WARNING if arguments.log_level == "passive" else arguments.get_process_log_level())
    if not is_main_process():
        transformers.logging.disable_progress_bar()
    config, checkpoint = options.adaptation.config(), checkpoint_of(fit.resume, arguments)
    encoder, task = resolve_model(data.model), _task(options)
    checked_metrics(task.kind, fit.metrics)
    transformers.set_seed(arguments.seed)
    with quiet():
        if task.kind == "generation":
            model, tokenizer = load_causal(encoder)
        else:
            model, tokenizer = load_classifier(encoder, task.label_names, data.pooling, task=task.kind)
    settings = {"max_new_tokens": fit.max_new_tokens, "beams": fit.beams} if task.kind == "generation" else {}
    size = arguments.per_device_eval_batch_size
    longest = min(data.max_tokens, longest_text(model, tokenizer))
    kind = make_kind(task.kind, task.label_names, tokenizer, longest, fit.metrics, settings, size)
    dev = task.dev.sample(data.max_eval_rows or None, 0)
    rows, dev_rows = kind.encode(task.train.sample(data.max_train_rows or None, arguments.seed)), kind.encode(dev)
    run = _run(options, task, model, settings, longest)
    notes = [*task.notes, *_notes(run, rows, dev_rows, model, config.method)]
    if longest < data.max_tokens:
        notes.append(f"texts are cut at {longest} tokens, which is all that this model takes")
    if is_main_process():
        for note in notes:
            print(f"note: {note}", flush=True)
    steps = _steps(arguments, len(rows))
    if steps < arguments.logging_steps and "logging_steps" not in options.given:
        arguments.logging_steps = max(1, steps // LOGS)
    baselines = _baselines(options, model, kind, rows, dev_rows, steps)
    if task.kind == "regression":
        start_at(model, sum(row["labels"] for row in rows) / len(rows))
    adapt(model, config)
    trained = run_training(model, kind, rows, dev_rows, options, checkpoint, run)
    if is_main_process():
        write_run(arguments.output_dir, run)
        scores = trained.scores
        if task.kind == "generation":  # per token, which the Trainer's is not, and the decoded texts
            with quiet():
                scores = kind.evaluate(model, dev, not arguments.disable_tqdm).values
        tell(Outcome(model, kind, run, scores, trained.losses, baselines, notes, len(dev_rows)), arguments.output_dir)
    return 0


def _task(options: Options) -> TextTask:
    data = options.data
    return load_task(
        data.data,
        task=data.task,
        text_column=data.text_column,
        text_pair_column=data.text_pair_column,
        label_column=data.label_column,
        dev_fraction=data.dev_fraction,
    )


def _run(options: Options, task: TextTask, model: Any, settings: dict[str, Any], longest: int) -> Run:
    from ..models.pooling import pooling_of

    return Run(
        model=options.data.model,
        data=options.data.data,
        label_names=task.label_names,
        max_tokens=longest,
        pooling=pooling_of(model) or "model",
        task=task.kind,
        text_column=task.columns.text,
        text_pair_column=task.columns.pair,
        label_column=task.columns.label,
        generation=settings,
        dev_fraction=options.data.dev_fraction,
    )


def _notes(run: Run, rows: list[dict[str, Any]], dev: list[dict[str, Any]], model: Any, method: str) -> list[str]:
    from .export import problem

    notes = []
    if run.task == "generation" and (lost := without_text(rows) + without_text(dev)):
        notes.append(f"{lost} texts do not fit into --max_tokens {run.max_tokens} and teach nothing")
    why = problem(model, run, method)
    if why:
        notes.append(f"adamix export will refuse this run: {why}")
    return notes


def _steps(arguments: Any, rows: int) -> int:
    """Optimizer steps of the run, as the Trainer counts them."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    size = int(arguments.train_batch_size) * max(1, int(arguments.world_size))
    epochs, accumulated = float(arguments.num_train_epochs), int(arguments.gradient_accumulation_steps)
    return math.ceil(epochs * max(1, math.ceil(math.ceil(rows / size) / accumulated)))


def _baselines(
    options: Options, model: Any, kind: Kind, rows: list[Any], dev: list[Any], steps: int
) -> Baselines | None:
    """On the main process alone, before the model is adapted."""
    arguments = options.arguments
    if options.fit.no_baselines or not is_main_process() or arguments.fsdp:
        return None
    model.to(arguments.device)
    size = arguments.train_batch_size * arguments.gradient_accumulation_steps * max(1, arguments.world_size)
    # A run shorter than an epoch sees so many rows.
    seen = rows if steps * size >= len(rows) else rows[: steps * size]
    return measure(model, kind, Work(seen, dev, size, steps, arguments.seed), not arguments.disable_tqdm)
