"""What eval, predict, merge and export share: a run, opened with the encoder it belongs to."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..models._files import read_json
from ..models.header import CHECKPOINT_NAME, PACK_NAME
from ..models.hub import resolve_folder
from ..models.manifest import newest_whole_checkpoint
from ..models.pooling import pooling_of
from ..models.run_values import RUN_NAME, run_folder
from ..tasks import Run, read_run
from ..tasks.loading import load_folder
from ._kinds import longest_text
from ._options import OutputOptions, option, quiet
from ._parser import OptionParser

logger = logging.getLogger(__name__)
REPORT_NAME, DIVERGED = "adamix_report.json", "diverged"
MAX_TOKENS = 512  # of a run without its file, where model and tokenizer take more


@dataclass
class RunOptions:
    _argument_group_name = "run"

    run: str = option("folder of adamix train, adamix merge or save_pretrained, or user/repo on the hub", "")
    model: str | None = option("hub id or folder of the encoder, where it is another than in training")
    revision: str | None = option("branch, tag or commit of user/repo")


@dataclass
class Opened:
    """folder: on this disk. run: of its run file (`filed`), or what the model itself tells."""

    model: nn.Module
    tokenizer: Any
    run: Run
    folder: Path
    filed: bool


def the_run(options: RunOptions, words: Sequence[str], command: str) -> RunOptions:
    """With the run taken from the words where --run is not given. Raises ValueError for none, or several."""
    given = [*([options.run] if options.run else []), *words]
    if len(given) != 1:
        got = ", ".join(map(repr, given)) or "nothing"
        raise ValueError(f"run: got {got}, expected one folder or user/repo: adamix {command} RUN")
    return dataclasses.replace(options, run=given[0])


def run_command(argv: Sequence[str], command: str, kind: type, text: str) -> tuple[RunOptions, Any, OutputOptions]:
    """The options of a command about one run, which may stand as a word."""
    types = RunOptions, kind, OutputOptions
    parsed = OptionParser(command, types, text, words="RUN", aliases={"checkpoint": "run"}).parse(argv)
    place, options, output = parsed.parts
    return the_run(place, parsed.words, command), options, output


def load_whole(folder: Path, source: str, model: str | None) -> tuple[Any, Any]:
    """(model, tokenizer), which pads. source: what `folder` was asked for by. Raises ValueError where there is no
    tokenizer."""
    with quiet():
        found, tokenizer = load_folder(folder, source, model)
    if tokenizer is None:
        raise ValueError(f"{source}: got no tokenizer in it, nor beside its base model, expected one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return found, tokenizer


def open_run(options: RunOptions) -> Opened:
    """Raises ValueError for what is no run, naming what is missing."""
    with _called_run():
        folder = resolve_folder(options.run, options.revision)
    _check_finished(options.run, folder)
    if (folder / PACK_NAME).is_file():
        raise ValueError(
            f"run: got {options.run!r}, a pack of several, expected one run: adamix predict --pack reads it, and "
            "adamix_kernels.unpack takes a name out of it"
        )
    place = run_folder(folder)
    run = None if place is None else read_run(place)  # before the model: a damaged file is answered at once
    with _called_run():
        model, tokenizer = load_whole(folder, options.run, options.model)
    if run is not None and place == folder and not same_labels(run, found := _described(model, tokenizer, folder)):
        logger.warning("%s: its %s is of what was here before, and not looked at", folder, RUN_NAME)
        return Opened(model, tokenizer, found, folder, False)
    return Opened(model, tokenizer, run or _described(model, tokenizer, folder), folder, place is not None)


def same_labels(told: Run, found: Run) -> bool:
    """Whether a run's file is of what the folder holds, not of what something else was saved in the place of. Labels
    that came without names have them from the file."""
    if told.task != found.task or found.task != "classification":
        return told.task == found.task
    unnamed = [f"LABEL_{number}" for number in range(len(told.label_names))]
    return found.label_names in (told.label_names, unnamed)


def _check_finished(given: str, folder: Path) -> None:
    """Raises ValueError for the folder of a training that was interrupted, which has its checkpoints alone."""
    if not (folder / RUN_NAME).is_file() or (folder / CHECKPOINT_NAME).is_file():
        return
    if (folder / REPORT_NAME).is_file() and read_json(folder / REPORT_NAME, "a report").get(DIVERGED):
        raise ValueError(
            f"run: got {given!r}, whose training diverged and was not saved, expected one with a lower --learning_rate"
        )
    last = newest_whole_checkpoint(folder)
    beside = "" if last is None else f", or its last checkpoint, {last}"
    raise ValueError(
        f"run: got {given!r}, whose training did not come to its end, expected the same adamix train with --resume "
        f"first{beside}"
    )


@contextlib.contextmanager
def _called_run() -> Iterator[None]:
    """In Python the argument is called source."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("source:"):
            raise
        raise ValueError(f"run{str(error).removeprefix('source')}") from error


def _described(model: Any, tokenizer: Any, folder: Path) -> Run:
    """A run out of a model that came without its file: its head says the task, its configuration the labels."""
    config = model.config
    kind = type(model).__name__
    if "SequenceClassification" not in kind:
        if not (hasattr(model, "generate") and model.can_generate()):
            raise ValueError(f"{folder}: got a {kind}, expected a model that classifies texts or writes them")
        task, names = "generation", []
    elif config.num_labels == 1 or config.problem_type == "regression":
        task, names = "regression", ["score"]
    else:
        task, names = "classification", [config.id2label[i] for i in range(config.num_labels)]
    return told_run(model, tokenizer, task, names, str(folder))


def told_run(model: Any, tokenizer: Any, task: str, names: list[str], place: str = "") -> Run:
    """The rest of a run that came without its file. place: stands for a base without a name."""
    most = min(longest_text(model, tokenizer), MAX_TOKENS)
    base = getattr(model.config, "_name_or_path", None) or place
    return Run(base, "", names, most, pooling_of(model) or "model", task)
