"""What a training says while it runs: a line for each log and evaluation, beside the bar where there is one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ._kinds import written

MOST = 20  # lines of evaluations, where nobody asked for a number of them
WORDS = {"cross_entropy": "cross-entropy", "grad_norm": "gradient norm"}
SAY = functools.partial(print, flush=True)  # to a file, too
Scores = Callable[[dict[str, float]], dict[str, float]]


class Lines(TrainerCallback):
    """Prints them. scores: of an evaluation's log. all_of_them: of the evaluations; else at most about MOST.

    checkpoint-*/trainer_state.json has every figure.
    """

    def __init__(self, scores: Scores, all_of_them: bool):
        self._scores, self._all, self._evaluated, self._ended = scores, all_of_them, 0, False
        self.say: Callable[[str], Any] = SAY

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero:
            return
        epoch = f"epoch {logs.get('epoch', 0):.4g}: "
        if "loss" in logs:
            names = [name for name in logs if name not in ("epoch", "total_flos")]
            parts = (f"{WORDS.get(name, name.replace('_', ' '))} {logs[name]:.4g}" for name in names)
            self.say(epoch + ", ".join(parts))
        elif "eval_loss" in logs and not self._ended:
            self._evaluated += 1
            last = state.global_step >= state.max_steps
            if self._all or last or self._evaluated % self._every(args, state) == 0:
                found = {"loss": logs["eval_loss"], **self._scores(logs)}
                self.say(epoch + "dev " + ", ".join(written(name, value) for name, value in found.items()))
        elif "train_runtime" in logs:
            self.say(f"trained in {logs['train_runtime']:.0f} s, {logs['train_samples_per_second']:.3g} texts a second")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._ended = True  # what is evaluated then is in the report

    @staticmethod
    def _every(args: Any, state: Any) -> int:
        """Of how many evaluations one is told."""
        steps = args.eval_strategy == "steps"
        number: float = state.max_steps / max(1, state.eval_steps) if steps else state.num_train_epochs
        return max(1, math.ceil(number / MOST))


class LinesBesideBar(ProgressCallback):
    """The Trainer's bar, with Lines in place of its dictionaries."""

    def __init__(self, lines: Lines):
        super().__init__()
        self._lines = lines

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._lines.say = SAY if self.training_bar is None else self.training_bar.write
        self._lines.on_log(args, state, control, logs, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        theirs: Any = super()
        theirs.on_train_end(args, state, control, **kwargs)
        self._lines.on_train_end()


def tell_by_lines(trainer: Trainer, scores: Scores, all_of_them: bool) -> None:
    """Lines in place of what the Trainer would print."""
    lines = Lines(scores, all_of_them)
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.pop_callback(theirs)
    trainer.add_callback(lines if trainer.args.disable_tqdm else LinesBesideBar(lines))
