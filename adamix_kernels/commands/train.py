"""adamix train: AdaMixTrainer on texts, with every flag of transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..models.centroid import Centroid, sentence_vectors
from ..models.config import AdaMixConfig
from ..models.header import CHECKPOINT_NAME
from ..models.inject import adapt, check_targets
from ..models.state import adamix_state
from ..recipes.processes import is_main, on_cpus
from ..tasks import Run, TextSplit, TextTask, load_causal, load_classifier, load_task, resolve_model
from ..tasks.batches import without_tasks
from ..tasks.generation import check_causal
from . import _defaults
from ._baselines import Baselines, Work, measure
from ._folder import alone_in
from ._kinds import Kind, checked_metrics, longest_text, make_kind, most_new_tokens, start_at, without_text
from ._options import needs_out, quiet, set_log_level
from ._parser import OptionParser
from ._train_options import SHOWN, AdaptationOptions, DataOptions, FitOptions, check_amounts

if TYPE_CHECKING:
    from ._report import Outcome

# Where they differ from TrainingArguments'; a flag or a file overrides each. Learning rate, epochs and warm-up are
# chosen by model and data: see _choose.
DEFAULTS = {
    "output_dir": "adamix_out",
    "weight_decay": _defaults.WEIGHT_DECAY,
    "per_device_train_batch_size": _defaults.BATCH,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 20,
    "report_to": "none",
}
CENTROID_TEXTS = 512  # of the training: enough for their mean
LOGS = 4  # lines of training loss in a run shorter than logging_steps


@dataclass
class Options:
    """arguments: TrainingArguments. given: names of the options that the user set."""

    data: DataOptions
    adaptation: AdaptationOptions
    fit: FitOptions
    arguments: Any
    given: frozenset[str]

    def config(self, tasks: int = 1) -> AdaMixConfig:
        """tasks: names in the column of tasks, where one is given."""
        return self.adaptation.config(self.given, self.data.task_column, tasks)


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
        # In a log file a bar would be a line each time it moves.
        defaults={
            **DEFAULTS,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "disable_tqdm": not sys.stderr.isatty(),
            "use_cpu": on_cpus(False),
        },
        aliases={"out": "output_dir"},
    )
    flags = list(argv)
    parsed = parser.parse(flags)
    data, adaptation, fit, arguments = parsed.parts
    check_amounts(data, fit, arguments)
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
    arguments = options.arguments
    import transformers

    set_log_level(logging.WARNING if arguments.log_level == "passive" else arguments.get_process_log_level())
    if not is_main():
        transformers.logging.disable_progress_bar()
    needs_out(arguments.output_dir)
    options.config()  # what is wrong is answered before anything is read
    with alone_in(arguments.output_dir, arguments.use_cpu):
        diverged = _train(options)
    if diverged and is_main():
        before = os.path.exists(os.path.join(arguments.output_dir, CHECKPOINT_NAME))
        holds = "the run as it was before" if before else "no run"
        print(f"adamix train: the training diverged, and {arguments.output_dir} holds {holds}", file=sys.stderr)
    return int(diverged)


def _train(options: Options) -> bool:
    """Whether it diverged."""
    arguments, data, fit = options.arguments, options.data, options.fit
    import transformers

    from ._begun import Begun
    from ._fit import checkpoint_of, run_training
    from ._report import Outcome

    checkpoint = checkpoint_of(fit.resume, arguments)
    encoder, task = resolve_model(data.model), _task(options)
    config = options.config(len(task.task_names))
    metrics = checked_metrics(task.kind, fit.metrics)
    transformers.set_seed(arguments.seed)
    with quiet():
        if task.kind == "generation":
            model, tokenizer = load_causal(encoder)
            check_causal(model, encoder.name)
        else:
            model, tokenizer = load_classifier(encoder, task.label_names, data.pooling, task=task.kind)
    check_targets(model, config)  # before the baselines, which take their time
    size = arguments.per_device_eval_batch_size
    longest = min(data.max_tokens, longest_text(model, tokenizer))
    settings = {}
    if task.kind == "generation":
        settings = {"max_new_tokens": fit.max_new_tokens or most_new_tokens(longest), "beams": fit.beams}
    kind = make_kind(task.kind, task.label_names, tokenizer, longest, metrics, settings, size)
    dev = task.dev.sample(data.max_eval_rows or None, 0)
    rows, dev_rows = kind.encode(task.train.sample(data.max_train_rows or None, arguments.seed)), kind.encode(dev)
    run = _run(options, task, model, settings, longest)
    notes = [*task.notes, *_notes(run, rows, dev_rows, model, config.method)]
    if told := kind.cuts.told(longest):
        notes.append(told + (": --max_tokens" if longest == data.max_tokens else ""))
    if longest < data.max_tokens:
        notes.append(f"texts are cut at {longest} tokens, which is all that this model takes")
    steps = _choose(options, model, task.kind, len(rows), config.method)
    begun = Begun.of(options, run, config, task)
    if fit.resume or arguments.resume_from_checkpoint:
        notes += begun.check(checkpoint, arguments.output_dir, model)
    if is_main():
        for note in notes:
            print(f"note: {note}")
        print(_plan(arguments, len(rows), len(dev_rows), steps), flush=True)
    bare, bare_dev = (without_tasks(part) for part in (rows, dev_rows))
    baselines = _baselines(options, model, kind, bare, bare_dev, steps)
    if task.kind == "regression":
        start_at(model, sum(row["labels"] for row in rows) / len(rows))
    centroid = _centroid(options, model, kind, bare)
    adapt(model, config)
    adamix_state(model).centroid = centroid
    trained = run_training(model, kind, rows, dev_rows, options, checkpoint, begun)
    if is_main():
        scores, losses, diverged = trained.scores, trained.losses, trained.diverged
        _tell(Outcome(model, kind, run, scores, losses, baselines, notes, len(dev), diverged), dev, arguments)
    return trained.diverged


def _tell(outcome: Outcome, dev: TextSplit, arguments: Any) -> None:
    from ._report import tell

    folder = arguments.output_dir
    try:
        if outcome.run.task == "generation" and not outcome.diverged:
            with quiet():  # per token, which the Trainer's is not, and the decoded texts
                outcome.scores = outcome.kind.evaluate(outcome.model, dev, not arguments.disable_tqdm).values
        tell(outcome, folder)
    except KeyboardInterrupt:
        there = "holds the trained run, without its report; adamix eval tells its score"
        raise KeyboardInterrupt("the training diverged" if outcome.diverged else f"{folder} {there}") from None


def _centroid(options: Options, model: Any, kind: Kind, rows: list[dict[str, Any]]) -> Centroid | None:
    """What the training texts look like to the bare encoder, by which a pack finds a text's run; None where it gives no
    state per token, and on the processes that do not save."""
    if not is_main() or options.arguments.fsdp:
        return None
    model.to(options.arguments.device)
    some = rows[:: max(1, len(rows) // CENTROID_TEXTS)][:CENTROID_TEXTS]
    some = [{name: value for name, value in row.items() if not isinstance(value, str)} for row in some]
    size = int(options.arguments.per_device_eval_batch_size)
    try:
        batches = (kind.collate(some[start : start + size]) for start in range(0, len(some), size))
        return Centroid.of(sentence_vectors(model, batches))
    except (ValueError, TypeError, RuntimeError, AttributeError):  # a model that wants more than text
        return None


def _task(options: Options) -> TextTask:
    data = options.data
    names = "task", "text_column", "text_pair_column", "label_column", "dev_fraction", "task_column"
    return load_task(data.data, **{name: getattr(data, name) for name in names})


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
        task_column=options.data.task_column,
        task_names=list(task.task_names),
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


def _choose(options: Options, model: Any, task: str, rows: int, method: str) -> int:
    """Sets what the user did not, by model and data; returns the optimizer steps of the run, as the Trainer counts."""
    arguments, given = options.arguments, options.given
    size = _rows_an_update(arguments)
    if "learning_rate" not in given:
        arguments.learning_rate = _defaults.learning_rate(model.config, task, method)
    if "num_train_epochs" not in given:
        arguments.num_train_epochs = float(_defaults.epochs(rows, size))
    steps = math.ceil(float(arguments.num_train_epochs) * _updates_an_epoch(arguments, rows))
    if arguments.max_steps > 0:
        steps = int(arguments.max_steps)
    if not given & {"warmup_steps", "warmup_ratio"}:
        arguments.warmup_steps = math.ceil(_defaults.WARMUP * steps)
    if steps < arguments.logging_steps and "logging_steps" not in given:
        arguments.logging_steps = max(1, steps // LOGS)
    return steps


def _updates_an_epoch(arguments: Any, rows: int) -> int:
    accumulated = int(arguments.gradient_accumulation_steps)
    batches = math.ceil(rows / (_rows_an_update(arguments) // accumulated))
    return max(1, math.ceil(batches / accumulated))


def _rows_an_update(arguments: Any) -> int:
    processes = max(1, int(arguments.world_size))
    return int(arguments.train_batch_size) * int(arguments.gradient_accumulation_steps) * processes


def _plan(arguments: Any, rows: int, dev: int, steps: int) -> str:
    epochs = steps / _updates_an_epoch(arguments, rows)
    return (
        f"training on {rows} texts, {dev} for dev: {epochs:.3g} epochs, {steps} updates of "
        f"{_rows_an_update(arguments)} texts, learning rate {arguments.learning_rate:g}"
    )


def _baselines(
    options: Options, model: Any, kind: Kind, rows: list[Any], dev: list[Any], steps: int
) -> Baselines | None:
    """On the main process alone, before the model is adapted."""
    arguments = options.arguments
    if options.fit.no_baselines or not is_main() or arguments.fsdp:
        return None
    model.to(arguments.device)
    size = _rows_an_update(arguments)
    # A run shorter than an epoch sees so many rows.
    seen = rows if steps * size >= len(rows) else rows[: steps * size]
    return measure(model, kind, Work(seen, dev, size, steps, arguments.seed), not arguments.disable_tqdm)
