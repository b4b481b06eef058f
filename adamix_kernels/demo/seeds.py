"""Every method on one seed, and all seeds, several at a time, each in a process of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import load_adamix, save_adamix
from ..models.config import AdaMixConfig
from ..models.contexts import eval_routing
from ..models.inject import adapt
from ..models.merging import merge
from ..tasks import Encoder, accuracy, load_classifier, predict
from .report import MethodResult
from .training import Data, Settings, frozen_features, train, train_head

FROZEN, PLAIN, LONGER = "frozen encoder + head", "one plain adapter", "one plain adapter, trained longer"
RANDOM, MERGED = "AdaMix, random routing", "AdaMix, merged"
TIMES = 1.8  # epochs of the longer training: a step of both passes takes about as many of one
# How all-MiniLM is meant to be read, and the same features for every row of the table.
POOLING = "mean"
READ_AGAIN = 64  # dev rows on which the loaded checkpoint must give the saved model's logits
_LOOK = 0.2  # seconds between two looks at the steps of other processes


@dataclass(frozen=True)
class Work:
    """What the seeds have in common. merged: the folder of the first seed's merged AdaMix checkpoint."""

    encoder: Encoder
    label_names: list[str]
    settings: Settings
    experts: int
    bottleneck: int
    merged: Path

    @property
    def longer(self) -> Settings:
        return dataclasses.replace(self.settings, epochs=round(TIMES * self.settings.epochs))

    def steps(self, rows: int) -> int:
        """Of one seed."""
        return 3 * self.settings.steps(rows) + self.longer.steps(rows)

    def fresh(self) -> Any:
        model, _ = load_classifier(self.encoder, self.label_names, POOLING)
        return model


def all_seeds(work: Work, data: Sequence[Data], jobs: int, bar: Any) -> list[MethodResult]:
    """Every method on every seed, data[seed] its rows.

    Args:
        jobs: seeds that are trained at a time; above 1 each in a process of its own, with its part of the threads.
        bar: updated by every training step.

    Raises what a seed raises, and BrokenProcessPool where its process ended before it was done; the other seeds'
    processes are ended first, at an interrupt too.
    """
    if jobs == 1:
        return _joined([one_seed(work, drawn, seed, bar) for seed, drawn in enumerate(data)])
    bar.set_description(f"{jobs} seeds at a time")
    context = multiprocessing.get_context("spawn")  # a fork would not have torch's threads
    steps, before = context.Queue(), set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _begin, (steps, torch.get_num_threads() // jobs))
    try:
        with _deaf_to_interrupts():
            running = [pool.submit(_one_seed, work, drawn, seed) for seed, drawn in enumerate(data)]
        left, told = set(running), 0
        while left:
            done, left = concurrent.futures.wait(running, _LOOK, concurrent.futures.FIRST_EXCEPTION)
            for each in done:
                each.result()
            while not steps.empty():
                told += steps.get()
                bar.update()
        # The last steps may be told later than their seed's results.
        bar.update(sum(work.steps(len(drawn.train)) for drawn in data) - told)
        return _joined([each.result() for each in running])
    except BaseException:  # an interrupt too: nobody waits for the other seeds
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def one_seed(work: Work, drawn: Data, seed: int, bar: Any) -> list[MethodResult]:
    """Every method on one seed. Seed 0 writes its merged AdaMix checkpoint, and reads it again."""
    results = {name: MethodResult(name) for name in (FROZEN, PLAIN, LONGER, RANDOM, MERGED)}
    bar.set_description(f"seed {seed}: {FROZEN}")
    torch.manual_seed(seed)
    features = frozen_features(work.fresh(), drawn)
    torch.manual_seed(seed)
    head, curve = train_head(work.fresh(), features, drawn, work.settings, seed, bar)
    results[FROZEN].add(accuracy(head(features["dev"]), drawn.dev), curve, head)
    weight = work.settings.consistency
    for name, experts, how in (
        (PLAIN, 1, work.settings),
        (LONGER, 1, work.longer),
        (MERGED, work.experts, work.settings),
    ):
        bar.set_description(f"seed {seed}: {name.removesuffix(', merged')}")
        torch.manual_seed(seed)
        config = AdaMixConfig(
            num_experts=experts, bottleneck=work.bottleneck, consistency_weight=weight if name == MERGED else 0.0
        )
        model = adapt(work.fresh(), config)
        curve = train(model, drawn, how, seed, bar)
        if name != MERGED:
            results[name].add(accuracy(_logits(model, drawn), drawn.dev), curve, model)
            continue
        with eval_routing(model, "sample"):
            results[RANDOM].add(accuracy(_logits(model, drawn), drawn.dev), curve, model)
        logits = _logits(merge(model), drawn)
        results[MERGED].add(accuracy(logits, drawn.dev), curve, model, trainable=results[RANDOM].trainable)
        if seed == 0:
            save_adamix(model, work.merged)
            some = dataclasses.replace(drawn, dev=drawn.dev[:READ_AGAIN])
            again = load_adamix(work.fresh(), work.merged)
            if not torch.equal(_logits(model, some), _logits(again, some)):
                raise RuntimeError("the loaded checkpoint does not give the saved model's logits")
    return list(results.values())


def quiet_transformers() -> None:
    """The fresh head's warnings and the loading bars would break the demo's own bar."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _joined(seeds: Sequence[list[MethodResult]]) -> list[MethodResult]:
    for first, *others in zip(*seeds, strict=True):
        for other in others:
            first.extend(other)
    return seeds[0]


def _logits(model: torch.nn.Module, data: Data) -> torch.Tensor:
    return predict(model, data.dev, data.collate)


class _Told:
    """The bar of a process that shows none: its steps go to the one that does."""

    steps: Any = None

    def update(self) -> None:
        self.steps.put(1)

    def set_description(self, text: str) -> None:
        pass


def _begin(steps: Any, threads: int) -> None:
    _Told.steps = steps
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, threads))
    quiet_transformers()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started here ignore Ctrl-C, which a terminal sends to all of them: the one that reads it ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what comes now waits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """A pool's processes would outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _one_seed(work: Work, drawn: Data, seed: int) -> list[MethodResult]:
    return one_seed(work, drawn, seed, _Told())
