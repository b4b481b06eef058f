"""kill -9 of a training at random moments, then resume_from_checkpoint=True: the bits of the uninterrupted run."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerState

from adamix_kernels import AdaMixTrainer
from adamix_kernels.models import manifest, trainer_checkpoints
from adamix_kernels.models.manifest import newest_whole_checkpoint

from ..children import Child, kill_self, killed
from ..record import Figure
from ..small_models import adapted, batch, digest

STEPS, SAVE_EVERY, ROWS = 8, 2, 12
SEED = 11
# (kind of model, routing); all with dropout. The last two also accumulate gradients over two batches.
RUNS = [
    ("BERT, adapters", "batch"),
    ("GPT-2, LoRA", "sample"),
    ("BERT, adapters", "token"),
    ("GPT-2, LoRA", "batch"),
]


class _Steps(TrainerCallback):
    def __init__(self, event: Callable[[str], None]):
        self.event = event

    def on_step_begin(self, *_args, **_kwargs):
        self.event("step")

    def on_pre_optimizer_step(self, *_args, **_kwargs):
        self.event("before the optimizer")

    def on_optimizer_step(self, *_args, **_kwargs):
        self.event("after the optimizer")


def train(folder: Path, run: int, die_at: int | None, send: Callable) -> None:
    """Trains, or goes on where there is a whole checkpoint; kills itself at the die_at-th event.

    Sends ("resumed", step) first, ("died", event) before a death, and ("done", digest, losses, events) at the end.
    """
    kind, routing = RUNS[run]
    events: list[str] = []

    def event(name: str, spoil: Callable[[], object] = lambda: None) -> None:
        events.append(name)
        if len(events) - 1 == die_at:
            spoil()
            send(("died", name))
            kill_self()

    _watch_writes(event)
    trainer = _trainer(folder, kind, routing, run // 2 + 1)
    trainer.add_callback(_Steps(event))
    for path in trainer.model.adamix.paths:
        trainer.model.get_submodule(path).register_forward_hook(lambda *_: event("forward"))
    logging.getLogger("adamix_kernels").setLevel(logging.ERROR)
    whole = newest_whole_checkpoint(folder)
    send(("resumed", 0 if whole is None else int(whole.rpartition("-")[2])))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.train(resume_from_checkpoint=whole is not None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "cross_entropy" in entry]
    send(("done", digest(trainer.model), losses, events))


def _watch_writes(event: Callable) -> None:
    """An event before each file of a checkpoint appears; one that transformers writes is half there when it dies."""

    def halved(function: Callable, name: str, path_at: int) -> Callable:
        def call(*args, **kwargs):
            def spoil():
                function(*args, **kwargs)
                os.truncate(args[path_at], os.path.getsize(args[path_at]) // 2)

            event(f"save: half of {name}", spoil)
            return function(*args, **kwargs)

        return call

    def before(function: Callable, name: str) -> Callable:
        def call(*args, **kwargs):
            event(name)
            return function(*args, **kwargs)

        return call

    torch.save = halved(torch.save, "torch.save", 1)
    TrainerState.save_to_json = halved(TrainerState.save_to_json, "trainer_state.json", 1)
    os.replace, os.fsync = before(os.replace, "save: rename"), before(os.fsync, "save: flush")
    trainer_checkpoints.write_manifest = before(manifest.write_manifest, "save: list of files")
    os.rmdir = before(os.rmdir, "save: removal of an old checkpoint")


def _trainer(folder: Path, kind: str, routing: str, accumulation: int) -> AdaMixTrainer:
    rows = batch(kind, ROWS)
    data = [{name: value[i] for name, value in rows.items()} for i in range(ROWS)]
    args = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=SAVE_EVERY, save_total_limit=2, logging_steps=1, use_cpu=True,
        report_to=[], disable_tqdm=True, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    model = adapted(kind, routing=routing, dropout=0.1)
    set_seed(4)
    return AdaMixTrainer(model, args, train_dataset=data)


def figures(runs: int, kills: int) -> Iterator[Figure]:
    for run in range(runs):
        yield _figure(run, kills)


def _figure(run: int, kills: int) -> Figure:
    """Trainings that are killed one to three times each until there were `kills` kills, then finish."""
    start = time.perf_counter()
    moments = random.Random(SEED + run)
    with tempfile.TemporaryDirectory() as name:
        wanted = finish(Path(name) / "whole", run)
        done = same = trainings = 0
        where, early = [], []
        while done < kills:
            folder = Path(name) / f"training{trainings}"
            for _ in range(min(kills - done, 1 + trainings % 3)):
                event = kill_at_random(folder, run, len(wanted[3]), moments)
                where.append(event)
                early += [event] if event is None else []
            done, trainings = len(where), trainings + 1
            same += finish(folder, run)[1:3] == wanted[1:3]
    saving = sum(event is not None and event.startswith("save") for event in where)
    kind, routing = RUNS[run]
    accumulated = ", 2 batches accumulated" if run >= 2 else ""
    return Figure(
        f"{kind}, routing per {routing}, dropout{accumulated}: trainings killed with kill -9, then resumed",
        f"{done} kills in {trainings} trainings, {saving} inside a checkpoint's save; the uninterrupted run's bits and "
        f"losses: {same}",
        f"{trainings} the same",
        same == trainings and saving > 0 and len(early) < done,
        time.perf_counter() - start,
    )


def kill_at_random(folder: Path, run: int, events: int, moments: random.Random) -> str | None:
    """What the training was doing when it died; None where it ended before its moment came."""
    child = Child(train, folder, run, moments.randrange(events))
    if not killed(child.end()):
        return None
    return child.messages()[-1][1]


def finish(folder: Path, run: int) -> tuple:
    """The last message of a training that nobody kills. Raises RuntimeError when it fails."""
    child = Child(train, folder, run, None)
    while (message := child.next_message())[0] != "done":
        pass
    child.end()
    return message
