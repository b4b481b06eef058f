"""Writes that fail for want of space: an OSError, the old checkpoint whole, no rubbish."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import safetensors.torch
from torch import nn

from adamix_kernels import AdaMixConfig, load_adamix, save_adamix
from adamix_kernels.convert import export_adapterhub, export_peft
from adamix_kernels.models.manifest import write_manifest
from adamix_kernels.recipes.results import append_row
from adamix_kernels.tasks import Run, write_run

from ..children import Child
from ..record import Figure
from ..small_models import adapted, base, digest

_KIND = "BERT, adapters"
_LIMITS = 24


def figures() -> Iterator[Figure]:
    yield _too_long()
    yield _refused_calls()
    yield _other_writers()


def limited(folder: Path, limits: list[int], send: Callable) -> None:
    """Saves once for every limit (bytes of a file), and tells how each save ended."""
    model = adapted(_KIND, 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in limits:
        with _limit(limit):
            ended = _ending(lambda: save_adamix(model, folder))
        send((ended, sorted(p.name for p in folder.iterdir())))
        save_adamix(adapted(_KIND, 1), folder)


@contextlib.contextmanager
def _limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _ending(work: Callable) -> str:
    try:
        work()
    except OSError:
        return "OSError"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def _too_long() -> Figure:
    """The kernel itself refuses to write beyond a limit, a full disk's twin (EFBIG for ENOSPC)."""
    start = time.perf_counter()
    good = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_adamix(adapted(_KIND, 1), folder)
        before = sorted(p.name for p in folder.iterdir())
        largest = max(p.stat().st_size for p in folder.iterdir())
        limits = [n * largest // _LIMITS for n in range(_LIMITS)]
        child = Child(limited, folder, limits)
        ended = [child.next_message() for _ in limits]
        finished = child.end() == 0
        good = sum(how == "OSError" and names == before for how, names in ended)
        kept = digest(load_adamix(base(_KIND), folder)) == digest(adapted(_KIND, 1))
    return Figure(
        f"save_adamix where files may hold 0 to {largest - 1:,} bytes (RLIMIT_FSIZE)",
        f"{good} of {len(limits)} an OSError, the old files alone in the folder",
        f"{len(limits)}",
        good == len(limits) and finished and kept,
        time.perf_counter() - start,
    )


@contextlib.contextmanager
def no_space(failing: int) -> Iterator[list[str]]:
    """The failing-th call that may need space raises ENOSPC; a write leaves half of its file. Yields the calls made."""
    calls: list[str] = []

    def wrapped(name: str, function: Callable, spoil: Callable = lambda *_: None) -> Callable:
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == failing + 1:
                spoil(*args)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call

    def half_text(path: Path, *_args) -> None:
        path.write_bytes(b"{")

    def half_tensors(_tensors: dict, path: Path, *_args) -> None:
        Path(path).write_bytes(b"\0" * 100)

    with (
        mock.patch.object(os, "replace", wrapped("replace", os.replace)),
        mock.patch.object(os, "fsync", wrapped("fsync", os.fsync)),
        mock.patch.object(os, "open", wrapped("open", os.open)),
        mock.patch.object(os, "write", wrapped("write", os.write)),
        mock.patch.object(Path, "mkdir", wrapped("mkdir", Path.mkdir)),
        mock.patch.object(Path, "write_text", wrapped("write_text", Path.write_text, half_text)),
        mock.patch.object(
            safetensors.torch, "save_file", wrapped("save_file", safetensors.torch.save_file, half_tensors)
        ),
    ):
        yield calls


def _refused_calls() -> Figure:
    start = time.perf_counter()
    failing, good, names = 0, 0, []
    old, new = adapted(_KIND, 1), adapted(_KIND, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while True:
            save_adamix(old, folder)
            with no_space(failing) as calls:
                ended = _ending(lambda: save_adamix(new, folder))
            if len(calls) <= failing:
                break
            names.append(calls[failing])
            # Flushing the folder is a courtesy: what the rename did stands.
            wanted = {"OSError": digest(old), "done": digest(new)}.get(ended)
            tidy = len(list(folder.iterdir())) == 2
            good += tidy and _loaded(folder) == wanted
            failing += 1
    return Figure(
        f"save_adamix, ENOSPC from each of its calls in turn ({', '.join(sorted(set(names)))})",
        f"{good} of {failing} an OSError and the old checkpoint, or the new one; no rubbish",
        f"{failing}",
        good == failing > 0,
        time.perf_counter() - start,
    )


def _loaded(folder: Path) -> str | None:
    try:
        return digest(load_adamix(base(_KIND), folder))
    except ValueError:
        return None


def _other_writers() -> Figure:
    start = time.perf_counter()
    good = tried = 0
    bert, gpt2 = adapted(_KIND), adapted("GPT-2, LoRA")
    with tempfile.TemporaryDirectory() as name:
        for number, write in enumerate(writers(bert, gpt2)):
            failing = 0
            while True:
                folder = Path(name) / f"{number}_{failing}"
                folder.mkdir()
                with no_space(failing) as calls:
                    ended = _ending(functools.partial(write, folder))
                if len(calls) <= failing:
                    break
                good += ended in ("OSError", "done") and not list(folder.rglob("*.tmp"))
                tried, failing = tried + 1, failing + 1
    return Figure(
        "ENOSPC from each call of the other writers (exports, configuration, run, rows, list of files)",
        f"{good} of {tried} an OSError, or done; no temporary files left",
        f"{tried}",
        good == tried > 0,
        time.perf_counter() - start,
    )


def writers(bert: nn.Module, gpt2: nn.Module) -> list[Callable[[Path], object]]:
    return [
        lambda folder: export_adapterhub(bert, folder),
        lambda folder: export_peft(gpt2, folder),
        lambda folder: AdaMixConfig().save(folder),
        lambda folder: write_run(folder, Run("encoder", "data", ["a", "b"], 8)),
        lambda folder: append_row(folder / "rows.jsonl", {"key": "a"}),
        write_manifest,
    ]
