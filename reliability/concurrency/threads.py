"""Two threads, each adapting, training, merging, saving and loading a model of its own.

Random routing and dropout draw from PyTorch's one generator per device, which threads share: what each thread then
gets depends on who comes first. So the experts are chosen here (use_experts), from a generator of each thread.
"""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from adamix_kernels import (
    AdaMixConfig,
    adamix_loss,
    adapt,
    double_batch,
    load_adamix,
    merge,
    save_adamix,
    unmerge,
    use_experts,
)
from adamix_kernels.routing import Router

from ..children import Child
from ..record import Figure
from ..small_models import KINDS, base, batch, digest, filled

_STEPS, _ROWS, _EXPERTS = 4, 4, 3


def figures(rounds: int) -> Iterator[Figure]:
    start = time.perf_counter()
    child = Child(compare, rounds)
    same, of, stray = child.next_message(600)
    ended = child.end() == 0
    yield Figure(
        f"two threads adapt, train, merge, save and load their own models, {rounds} rounds in a fresh process",
        f"{same} of {of} with the bits of the same work in turn",
        f"{of}",
        ended and same == of > 0,
        time.perf_counter() - start,
    )
    yield Figure(
        "the same threads with random routing: draws outside a layer's experts, or losses that are not finite",
        f"{stray}",
        "0",
        ended and stray == 0,
    )


def compare(rounds: int, send: Callable) -> None:
    """Threads first, so that they race for everything that is loaded on first use. Sends (same, of, stray)."""
    _bases()
    sys.setswitchinterval(1e-5)
    same = of = stray = 0
    for turn in range(rounds):
        works = [lambda kind=kind, turn=turn: course(kind, turn) for kind in KINDS]
        together, alone = at_once(works), [work() for work in works]
        same += sum(a == b for a, b in zip(together, alone, strict=True))
        of += len(works)
        stray += sum(at_once([lambda kind=kind: drawn_strays(kind) for kind in KINDS]))
    send((same, of, stray))


def at_once(works: list[Callable]) -> list:
    """What each returned, all run in threads that start together. Raises what one of them raised."""
    gate = threading.Barrier(len(works))
    results: list = [None] * len(works)
    errors: list[Exception] = []

    def run(number: int) -> None:
        try:
            gate.wait()
            results[number] = works[number]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def course(kind: str, seed: int) -> list[str]:
    """Digests of the trained model, of its logits merged and unmerged, and of the model loaded from its checkpoint."""
    model = filled(adapt(_base(kind), AdaMixConfig(**KINDS[kind])), seed).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(_STEPS):
        experts = torch.randint(_EXPERTS, (2 * _ROWS,), generator=generator)
        with use_experts(model, experts):
            _loss(kind, model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [digest(model)]
    model.eval()
    inputs = {name: value for name, value in batch(kind, _ROWS).items() if name != "labels"}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for change in (lambda m: m, merge, unmerge):
            found.append(repr(change(model)(**inputs).logits.tolist()))
        loaded = load_adamix(_base(kind), save_adamix(model, Path(folder)))
        found.append(digest(loaded))
    return found


def drawn_strays(kind: str) -> int:
    """A few steps with random routing; how many draws were no expert, and how many losses not finite."""
    model = filled(adapt(_base(kind), AdaMixConfig(**KINDS[kind], routing="sample")), 0).train()
    model.adamix.router = own = _Watched("sample")
    for path in model.adamix.paths:
        layer = model.get_submodule(path)
        (layer.adapter if hasattr(layer, "adapter") else layer).router = own
    finite = sum(bool(_loss(kind, model, step).isfinite()) for step in range(_STEPS))
    return own.strays + _STEPS - finite


class _Watched(Router):
    strays = 0

    def draw(self, num_experts, batch, tokens, device, training):
        index = super().draw(num_experts, batch, tokens, device, training)
        if index is not None:
            self.strays += int(not bool(((index >= 0) & (index < num_experts)).all()) or len(index) != batch)
        return index


def _base(kind: str) -> torch.nn.Module:
    return copy.deepcopy(_bases()[kind])


@functools.cache
def _bases() -> dict[str, torch.nn.Module]:
    """Made before any thread starts: their random weights come from the generator that the threads share."""
    return {kind: base(kind) for kind in KINDS}


def _loss(kind: str, model: torch.nn.Module, step: int) -> torch.Tensor:
    rows = batch(kind, _ROWS, seed=step)
    labels = rows.pop("labels")
    logits = model(**double_batch(rows)).logits
    if kind.startswith("GPT-2"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return adamix_loss(logits, labels).loss
