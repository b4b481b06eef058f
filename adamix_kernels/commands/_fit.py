"""The training itself: the Trainer, its callbacks, where it goes on from."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback

from ..models.gate_training import NAMES
from ..models.header import PACK_NAME
from ..models.manifest import first_save_was_cut, newest_whole_checkpoint
from ..models.state import adamix_state
from ..models.trainer import AdaMixTrainer
from ..recipes.processes import agree
from ..tasks.generation import labels_for
from ..tasks.run_file import RUN_NAME
from ._begun import Begun
from ._kinds import FALLING, Kind, LabelKind
from ._lines import tell_by_lines
from ._train_options import LAST

logger = logging.getLogger(__name__)
FINISHED = "adamix_checkpoint.json"


@dataclass
class Trained:
    """scores: of the kept model on dev, in the units of Kind.scores. losses: the run's mean, the last log's parts.
    diverged: its numbers are not finite, and it was not saved."""

    scores: dict[str, float]
    losses: dict[str, float]
    diverged: bool = False


class HeadRateTrainer(AdaMixTrainer):
    """AdaMixTrainer with a learning rate of its own for the task head; 0 keeps the common one."""

    def __init__(self, *args: Any, head_learning_rate: float = 0.0, **kwargs: Any):
        self._head_rate = head_learning_rate
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not fresh or not self._head_rate:
            return optimizer
        heads = {id(p) for path in adamix_state(self.model).saved for p in self.model.get_submodule(path).parameters()}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in heads]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in heads]
                optimizer.add_param_group({**group, "params": own, "lr": self._head_rate})
        return optimizer


def run_training(
    model: nn.Module,
    kind: Kind,
    rows: list[dict[str, Any]],
    dev: list[dict[str, Any]],
    options: Any,
    checkpoint: str | None,
    begun: Begun,
) -> Trained:
    """Trains, keeps what --load_best_model_at_end asks for, evaluates on dev, and saves what did not diverge."""
    arguments, fit = options.arguments, options.fit
    chooses = arguments.load_best_model_at_end or arguments.save_strategy == "best"
    if chooses and "metric_for_best_model" not in options.given and isinstance(kind, LabelKind):
        arguments.metric_for_best_model = kind.leading
        arguments.greater_is_better = kind.leading not in FALLING
    trainer = HeadRateTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=dev,
        data_collator=labels_for(model, kind.collate),
        processing_class=kind.tokenizer,
        compute_metrics=kind.trainer_metrics if isinstance(kind, LabelKind) else None,
        callbacks=[EarlyStoppingCallback(fit.early_stopping)] if fit.early_stopping else None,
        head_learning_rate=fit.head_learning_rate,
    )
    asked = {"eval_strategy", "eval_steps"} & options.given
    tell_by_lines(trainer, lambda logs: _scores(logs, kind), bool(asked))
    if trainer.is_world_process_zero():
        begun.write(arguments.output_dir)
    try:
        done = trainer.train(resume_from_checkpoint=checkpoint)
        metrics = {name: value for name, value in trainer.evaluate().items() if value != -math.inf}
        lost = isinstance(kind, LabelKind) and not math.isfinite(metrics["eval_loss"])  # of a text without a word it is
        diverged = agree(lost or not all_finite(model))
        if not diverged:
            trainer.save_model()
        trainer.save_metrics("eval", metrics)
    except KeyboardInterrupt:
        last = newest_whole_checkpoint(arguments.output_dir)
        there = "nothing is saved" if last is None else f"{os.path.basename(last)} is saved"
        how = "the same command begins anew" if last is None else "the same command with --resume goes on"
        raise KeyboardInterrupt(f"{there}; {how}") from None
    return Trained(_scores(metrics, kind), _losses(done, trainer.state.log_history), diverged)


def all_finite(model: nn.Module) -> bool:
    """Of what is trained."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters() if parameter.requires_grad)


def _scores(metrics: dict[str, float], kind: Kind) -> dict[str, float]:
    """The Trainer's own figures in the units of Kind.scores: percent."""
    if not isinstance(kind, LabelKind):
        return {"loss": metrics["eval_loss"]}
    values = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    known = [*kind.metrics, "rmse"]
    return {n: values[n] if n == "rmse" else 100 * values[n] for n in dict.fromkeys(known) if n in values}


def _losses(done: Any, history: list[dict[str, float]]) -> dict[str, float]:
    logs = [log for log in history if "cross_entropy" in log]
    names = ("cross_entropy", "consistency", *NAMES)
    last = {name: logs[-1][name] for name in names if name in logs[-1]} if logs else {}
    return {"loss": float(done.training_loss), **last}


def checkpoint_of(resume: str, arguments: Any) -> str | None:
    """The checkpoint to go on from, or None. Raises ValueError where --out has another run's and none is asked for."""
    from transformers.trainer_utils import get_last_checkpoint

    wanted = resume or arguments.resume_from_checkpoint
    folder = arguments.output_dir
    if wanted == LAST:
        last = newest_whole_checkpoint(folder)
        if last is None and os.path.exists(os.path.join(folder, RUN_NAME)) and first_save_was_cut(folder):
            logger.warning("%s: the first save of a checkpoint was interrupted: training from the beginning", folder)
        elif last is None:
            raise ValueError(
                f"resume: {folder!r} holds no checkpoint to go on from that is whole, expected one, or the command "
                "without --resume and another folder"
            )
        return last
    if wanted and not os.path.isdir(wanted):
        raise ValueError(f"resume: {wanted!r}: no such folder")
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if not wanted and last is not None:
        raise ValueError(
            f"out: {folder!r} holds {os.path.basename(last)} of an earlier run, expected --resume, or another folder"
        )
    if not wanted and os.path.exists(os.path.join(folder, FINISHED)):
        raise ValueError(f"out: {folder!r} holds a finished run, expected another folder, or this one removed")
    if os.path.exists(os.path.join(folder, PACK_NAME)):
        raise ValueError(f"out: {folder!r} holds a pack, expected another folder")
    return wanted or None
