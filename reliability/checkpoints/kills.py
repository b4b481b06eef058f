"""kill -9 while save_adamix writes over an older checkpoint."""

from __future__ import annotations

import copy
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from adamix_kernels import load_adamix, save_adamix
from adamix_kernels.models import _files

from ..children import Child, kill_self, killed
from ..record import Figure
from ..small_models import adapted, base, digest

_KIND = "BERT, adapters"
_PIECES, _PAUSE = 8, 0.002  # of every slowed write: how many, and seconds between them
_SAVED = 2  # files of a checkpoint
SEED = 5


def figures(kills: int) -> Iterator[Figure]:
    yield _at_random(kills)
    yield _at_every_call()


def save_forever(folder: Path, send: Callable) -> None:
    """Two checkpoints in turn, slowly; tells before and after each save."""
    _slow_down(time.sleep)
    models = [adapted(_KIND, seed) for seed in (1, 2)]
    for number in range(1_000_000):
        send(("begin", number))
        save_adamix(models[number % 2], folder)
        send(("end", number))


def save_and_die(folder: Path, call: int, send: Callable) -> None:
    """One save of the second checkpoint; dies before the call-th step of writing, if there are so many."""
    steps = iter(range(1_000_000))
    _slow_down(lambda _pause: kill_self() if next(steps) == call else None)
    save_adamix(adapted(_KIND, 2), folder)
    send("saved")


def _slow_down(pause: Callable[[float], None]) -> None:
    """Writes in pieces; a pause before every piece, flush, rename and removal."""
    from safetensors.torch import save

    def in_pieces(path: Path, data: bytes) -> None:
        with open(path, "wb", buffering=0) as file:
            for n in range(_PIECES):
                pause(_PAUSE)
                file.write(data[n * len(data) // _PIECES : (n + 1) * len(data) // _PIECES])

    def paused(function: Callable) -> Callable:
        def call(*args, **kwargs):
            pause(_PAUSE)
            return function(*args, **kwargs)

        return call

    _files._save_tensors = lambda path, tensors: in_pieces(path, save({n: t.detach() for n, t in tensors.items()}))
    Path.write_text = lambda self, text, encoding=None: in_pieces(self, text.encode())
    os.replace, os.fsync, Path.unlink = paused(os.replace), paused(os.fsync), paused(Path.unlink)


def whole(folder: Path, models: dict[str, int]) -> bool:
    """Whether the folder loads as one of the models (digest -> seed), and the next save leaves it tidy."""
    try:
        found = digest(load_adamix(copy.deepcopy(base(_KIND)), folder))
    except ValueError:
        return False
    save_adamix(adapted(_KIND, 1), folder)
    return found in models and len(list(folder.iterdir())) == _SAVED


def _at_random(kills: int) -> Figure:
    start = time.perf_counter()
    waits = random.Random(SEED)
    models = {digest(adapted(_KIND, seed)): seed for seed in (1, 2)}
    inside = good = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_adamix(adapted(_KIND, 1), folder)
        for _ in range(kills):
            child = Child(save_forever, folder)
            last = child.next_message()
            time.sleep(waits.uniform(0, 0.25))
            child.kill()
            inside += ([last, *child.messages()][-1])[0] == "begin"
            good += whole(folder, models)
    return Figure(
        "save_adamix over an older checkpoint, kill -9 at random moments",
        f"{kills} kills, {inside} inside a save; old or new checkpoint whole, then tidied up: {good}",
        f"{kills} whole",
        good == kills and inside > kills // 2,
        time.perf_counter() - start,
    )


def _at_every_call() -> Figure:
    start = time.perf_counter()
    models = {digest(adapted(_KIND, seed)): seed for seed in (1, 2)}
    kills = good = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_adamix(adapted(_KIND, 1), folder)
        while True:
            child = Child(save_and_die, folder, kills)
            status = child.end()
            if not killed(status):
                break
            good += whole(folder, models)
            kills += 1
        finished = status == 0 and digest(load_adamix(base(_KIND), folder)) == digest(adapted(_KIND, 2))
    return Figure(
        "the same, kill -9 before every piece written, flush, rename and removal in turn",
        f"{kills} kills; whole: {good}; unkilled, the new one: {finished}",
        f"{kills} whole",
        finished and good == kills > _PIECES,
        time.perf_counter() - start,
    )
