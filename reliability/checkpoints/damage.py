"""Every file of a checkpoint cut short and with one bit flipped: an error, or the very same model."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import TrainingArguments

from adamix_kernels import AdaMixTrainer, load_adamix, merge, save_adamix
from adamix_kernels.convert import load_official
from adamix_kernels.models.manifest import MANIFEST_NAME, check_manifest
from adamix_kernels.recipes.results import append_row, read_rows
from adamix_kernels.tasks import Run, read_run, write_run

from ..record import Figure
from ..small_models import KINDS, adapted, base, batch, picture
from .official import official_state

SEED = 9
# What one look at a folder may end in: the right thing was loaded, or an error or warning came.
HARMLESS, DETECTED = "harmless", "detected"


def figures(truncations: int, flips: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        for about, files, look in _subjects(Path(folder)):
            for file in files:
                yield _figure(f"{about}: {_general(file.name)}", file, look, truncations, flips)


def sweep(file: Path, look: Callable[[Path], str], truncations: int, flips: int) -> Counter:
    """How often look(file) said what, over damages of `file`, which is whole again afterwards."""
    whole = file.read_bytes()
    found = Counter()
    try:
        for damaged in damages(whole, truncations, flips):
            file.write_bytes(damaged)
            found[_said(look, file)] += 1
    finally:
        file.write_bytes(whole)
    return found


def _said(look: Callable[[Path], str], file: Path) -> str:
    try:
        return look(file)
    except Exception as error:
        return f"raised {type(error).__name__}"


def damages(whole: bytes, truncations: int, flips: int) -> Iterator[bytes]:
    """Cut evenly from 0 bytes to all but one; then single bits flipped, drawn from a fixed seed."""
    for n in range(truncations):
        yield whole[: n * (len(whole) - 1) // max(1, truncations - 1)]
    bits = random.Random(SEED)
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[bits.randrange(len(whole))] ^= 1 << bits.randrange(8)
        yield bytes(damaged)


def _figure(about: str, file: Path, look, truncations: int, flips: int) -> Figure:
    start = time.perf_counter()
    found = sweep(file, look, truncations, flips)
    wrong = sum(found.values()) - found[HARMLESS] - found[DETECTED]
    others = "".join(f"; {word}: {count}" for word, count in found.items() if word not in (HARMLESS, DETECTED))
    return Figure(
        f"{about}, {truncations} truncations and {flips} flipped bits",
        f"{found[DETECTED]} detected, {found[HARMLESS]} harmless, {wrong} wrong{others}",
        "0 wrong",
        wrong == 0 and found.total() == truncations + flips and found[DETECTED] > 0,
        time.perf_counter() - start,
    )


def _subjects(folder: Path) -> Iterator[tuple[str, list[Path], Callable[[Path], str]]]:
    for number, kind in enumerate([*KINDS, *KINDS]):
        model = adapted(kind, consistency_weight=2.0)
        model = merge(model) if number >= len(KINDS) else model
        where = save_adamix(model, folder / f"saved{number}")
        word = "merged " if number >= len(KINDS) else ""
        yield f"save_adamix, {word}{kind}", sorted(where.iterdir()), _loads(kind, where)
    yield "adamix train's record of the run", [_run_file(folder / "run")], _reads_run
    where = _training_checkpoint(folder / "trained")
    yield "training checkpoint", sorted(p for p in where.rglob("*") if p.is_file()), _resumes
    yield "results of recipes", [_rows_file(folder / "rows.jsonl")], _reads_rows
    for kind in KINDS:
        file = folder / f"official{len(kind)}.bin"
        torch.save(official_state(kind), file)
        yield f"official checkpoint, {kind}", [file], _loads_official(kind, file)


def _loads(kind: str, folder: Path) -> Callable[[Path], str]:
    model = base(kind)
    wanted = picture(load_adamix(copy.deepcopy(model), folder))
    return lambda file: _outcome(lambda: load_adamix(copy.deepcopy(model), folder), wanted, file)


def _loads_official(kind: str, whole: Path) -> Callable[[Path], str]:
    model = base(kind)
    wanted = picture(load_official(copy.deepcopy(model), whole))
    return lambda file: _outcome(lambda: load_official(copy.deepcopy(model), file), wanted, file)


def _outcome(load: Callable, wanted: tuple, file: Path) -> str:
    try:
        model = load()
    except ValueError as error:
        return DETECTED if file.name in str(error) else f"an error that does not name the file ({error})"
    return HARMLESS if picture(model) == wanted else "a wrong model"


def _run_file(folder: Path) -> Path:
    folder.mkdir()
    write_run(folder, Run("encoder", "data", ["bad", "good"], 128, "mean"))
    return next(folder.iterdir())


def _reads_run(file: Path) -> str:
    try:
        run = read_run(file.parent)
    except ValueError as error:
        return DETECTED if file.name in str(error) else "an error that does not name the file"
    return HARMLESS if run == Run("encoder", "data", ["bad", "good"], 128, "mean") else "a wrong run"


def _training_checkpoint(folder: Path) -> Path:
    kind = next(iter(KINDS))
    rows = batch(kind, 4)
    data = [{name: value[i] for name, value in rows.items()} for i in range(4)]
    args = TrainingArguments(
        str(folder), max_steps=1, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=2,
    )  # fmt: skip
    with contextlib.redirect_stdout(None):
        AdaMixTrainer(adapted(kind), args, train_dataset=data).train()
    return folder / "checkpoint-1"


def _resumes(file: Path) -> str:
    """What stands before a resume; it reads every file, so a change that it lets pass is one of its own file."""
    try:
        check_manifest(file.parent)
    except ValueError as error:
        return DETECTED if file.name in str(error) else "an error that does not name the file"
    return HARMLESS if file.name == MANIFEST_NAME else "a damaged file taken as whole"


_ROWS = [{"key": f"run {n}", "score": n / 7, "identity": {"seed": n}} for n in range(6)]


def _rows_file(path: Path) -> Path:
    for row in _ROWS:
        append_row(path, row)
    return path


def _reads_rows(file: Path) -> str:
    """No row may have another value. A row that is missing is run again, so a whole line may be cut off."""
    warnings = []
    handler = logging.Handler()
    handler.emit = warnings.append
    logger = logging.getLogger("adamix_kernels.recipes.results")
    logger.addHandler(handler)
    logger.propagate, before = False, logger.propagate
    try:
        rows = read_rows(file)
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
    if not all(any(_hashable(whole) <= _hashable(row) for whole in _ROWS) for row in rows):
        return "a wrong row"
    return DETECTED if warnings else HARMLESS


def _hashable(row: dict) -> set[tuple[str, str]]:
    return {(name, repr(value)) for name, value in row.items()}


def _general(name: str) -> str:
    """Without the digest that a file name may hold."""
    return "adamix-*.safetensors" if name.startswith("adamix-") else name
