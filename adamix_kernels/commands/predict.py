"""adamix predict: labels and probabilities, numbers or generated texts for new texts."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..models.gate_training import weighs_by_task
from ..tasks import InputRow, Run, read_inputs
from ..tasks._task_names import TaskNames
from ..tasks.inputs import has_columns
from ..tasks.reading import checked_text
from ._kinds import Kind, make_kind, warn_of_cuts
from ._options import OutputOptions, at_least, option, same_file, shows_bars, start
from ._packs import check_pair, on_pairs, open_pack
from ._parser import OptionParser
from ._predictions import Lines, Printed, Sink, chunks
from ._runs import RunOptions, open_run

logger = logging.getLogger(__name__)
Answer = Callable[[Sequence[InputRow]], list[dict[str, Any]]]
# What is read, what answers, rows of a chunk, the kinds by the pack's names.
Work = tuple[Iterator[InputRow], Answer, int, dict[str, Kind]]
BATCHES = 16  # of a chunk: sorted by length together, written together
BAR_AFTER = 1.0  # seconds: what is done by then needs no bar


@dataclass
class PredictOptions:
    _argument_group_name = "texts and predictions"

    pair: list[str] = option("the second text of each TEXT, for text pairs", [])
    file: str | None = option("txt (a text a line), csv, tsv, jsonl or parquet; - is standard input, as txt")
    text_column: str | None = option("of the file; by its name, if not given")
    text_pair_column: str | None = option("likewise, of the second text of a pair")
    task_name: str | None = option("gates by task: the task of all texts, by its name in the training")
    task_column: str | None = option("gates by task: the column of --file with each; the training's, if not given")
    out: str | None = option("JSON-lines file, a line a text; printed, if not given")
    overwrite: bool = option("replace --out if it is there", False)
    resume: bool = option("go on behind the last line of --out: the same file as at once", False)
    json: bool = option("print JSON lines", False)
    batch_size: int | None = option("texts of a batch; 64, or 8 where texts are generated")
    max_new_tokens: int | None = option("of a generated text, if not as in training")
    pack: str | None = option("folder of adamix pack, in the place of --run")
    adapter: str | None = option("pack: the name for all texts")
    adapter_column: str | None = option("pack: the column of --file with each name")
    route: Literal["nearest"] | None = option("pack: nearest: each text's name by the training texts it is most like")
    threshold: str | None = option("pack: with --route, the least cosine, or auto; texts below it get no label")
    beams: int | None = option("of the beam search, if not as in training")


def main(argv: Sequence[str]) -> int:
    parser = OptionParser(
        "predict",
        (RunOptions, PredictOptions, OutputOptions),
        "Apply a run to new texts: TEXT ... or --file. Texts that begin with - stand behind --.",
        words="[TEXT ...]",
        aliases={"checkpoint": "run"},
    )
    parsed = parser.parse(argv)
    place, options, output = parsed.parts
    _check_pack(options, place)
    _check(options, parsed.words)
    start(output)
    if options.file:
        read_inputs(options.file)  # a missing file is answered before the model is loaded
    lines = Lines(options.out, options.overwrite, options.resume) if options.out else None
    rows, answer, size, kinds = (
        _pack(options, parsed.words, place) if options.pack else _single(options, parsed.words, place)
    )
    try:
        if lines is None:
            bar = shows_bars(output) and bool(options.file) and not sys.stdout.isatty()
            _run(answer, rows, Printed(sys.stdout, options.json), size, bar)
            return 0
        with lines:
            _run(answer, rows, lines, size, shows_bars(output))
            lines.complete()
    finally:
        warn_of_cuts(logger, kinds, written=True)
    print(f"{lines.count} rows: {options.out}")
    return 0


def _single(options: PredictOptions, words: Sequence[str], place: RunOptions) -> Work:
    opened = open_run(place)
    kind = _kind(opened.run, opened.tokenizer, options)
    model = opened.model.cuda() if torch.cuda.is_available() else opened.model
    tasks = _tasks(options, opened.run, weighs_by_task(model))

    def answer(chunk: Sequence[InputRow]) -> list[dict[str, Any]]:
        pairs = [row.pair for row in chunk if row.pair is not None]
        ids = None if tasks is None else [tasks.id(str(row.name), row.place) for row in chunk]
        return kind.predictions(model, [row.text for row in chunk], pairs or None, ids)

    rows = _rows(options, words, opened.run, None if tasks is None else tasks.column)
    if tasks is not None:
        rows = (dataclasses.replace(row, name=options.task_name or row.name) for row in rows)
    return rows, answer, kind.batch_size * BATCHES, {"": kind}


def _tasks(options: PredictOptions, run: Run, needed: bool) -> TaskNames | None:
    """How the tasks of the texts are told: their names, and the column, "" where --task_name tells it for all."""
    if not needed:
        given = "task_name" if options.task_name else "task_column" if options.task_column else None
        if given:
            raise ValueError(f"{given}: got {getattr(options, given)!r}, expected none: this run has no gates by task")
        return None
    if not run.task_names:
        raise ValueError("run: got gates by task without their names, expected a run of adamix train, or use_tasks()")
    known = TaskNames("", tuple(run.task_names))
    if options.task_name:
        if options.task_column:
            raise ValueError("task_name: got --task_column too, expected one of them")
        known.id(options.task_name, "task_name")
        return known
    if not options.file or not has_columns(options.file):
        raise ValueError(
            f"task_name: got nothing, expected one of the training's tasks, {', '.join(map(repr, known.names))}: the "
            "gates are by task"
        )
    return TaskNames(options.task_column or str(run.task_column), known.names)


def _pack(options: PredictOptions, words: Sequence[str], place: RunOptions) -> Work:
    settings = _settings(options)
    opened = open_pack(
        str(options.pack), place.model, options.adapter, options.threshold, options.batch_size, settings
    )  # fmt: skip
    if torch.cuda.is_available():
        opened.model.cuda()
    named = options.adapter_column
    rows = _called("adapter_column", _of_file(options, named)) if options.file else _words(options, words)
    checked = (opened.check(row) for row in rows)
    return checked, opened.answers, opened.batch_size * BATCHES, opened.kinds


def _settings(options: PredictOptions) -> dict[str, Any]:
    changes = {"max_new_tokens": options.max_new_tokens, "beams": options.beams}
    return {name: value for name, value in changes.items() if value is not None}


def _of_file(options: PredictOptions, name_column: str | None) -> Iterator[InputRow]:
    columns = {"text_column": options.text_column, "text_pair_column": options.text_pair_column}
    return read_inputs(str(options.file), **columns, name_column=name_column)


def _called(option: str, rows: Iterator[InputRow]) -> Iterator[InputRow]:
    """read_inputs calls the column of the names name_column."""
    try:
        yield from rows
    except ValueError as error:
        if not str(error).startswith("name_column:"):
            raise
        raise ValueError(f"{option}{str(error).removeprefix('name_column')}") from error


def _words(options: PredictOptions, words: Sequence[str]) -> Iterator[InputRow]:
    seconds: Sequence[str | None] = options.pair or [None] * len(words)
    for number, (word, pair) in enumerate(zip(words, seconds, strict=True), 1):
        place = f"text {number}"
        more = None if pair is None else checked_text(pair, lambda place=place: f"{place}, its pair")
        yield InputRow(checked_text(word, lambda place=place: place), more, place)


def _kind(run: Run, tokenizer: Any, options: PredictOptions) -> Kind:
    settings = {**run.generation, **_settings(options)}
    return make_kind(run.task, run.label_names, tokenizer, run.max_tokens, (), settings, options.batch_size)


def _rows(options: PredictOptions, words: Sequence[str], run: Run, tasks: str | None = None) -> Iterator[InputRow]:
    """The texts; of a file by the given columns, or those of the training where it has them, or by their names.

    Raises ValueError, at the row, for a second text that is missing, or that the run knows nothing of.
    """
    if not options.file:
        rows = _words(options, words)
    elif options.text_column or options.text_pair_column or not run.text_column:
        rows = _called("task_column", _of_file(options, tasks or None))
    else:
        rows = _by_training_columns(options.file, run, tasks)
    return (_checked(row, run) for row in rows)


def _by_training_columns(file: str, run: Run, tasks: str | None) -> Iterator[InputRow]:
    more = {"name_column": tasks or None}
    columns = {"text_column": run.text_column, "text_pair_column": run.text_pair_column}
    rows = _called("task_column", read_inputs(file, **columns, **more))
    try:
        first = next(rows, None)
    except ValueError as error:
        if not str(error).startswith("text_"):
            raise
        return _called("task_column", read_inputs(file, **more))
    return rows if first is None else itertools.chain([first], rows)


def _checked(row: InputRow, run: Run) -> InputRow:
    return check_pair(row, on_pairs(run))


def _run(answer: Answer, rows: Iterator[InputRow], sink: Sink, size: int, progress: bool) -> None:
    """Predicts chunk by chunk and hands each to `sink`, in the rows' order.

    An unreadable row ends it with ValueError, which says how far it came; what stands before it is written first.
    """
    from tqdm.auto import tqdm

    error: ValueError | None = None
    try:
        with tqdm(unit="row", disable=not progress, delay=BAR_AFTER) as bar:
            for chunk, wrong in chunks(rows, size):
                error = wrong
                if chunk and sink.wants(chunk):
                    sink.write(chunk, answer(chunk))
                bar.update(len(chunk))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(sink.told()) from None
    if error is not None:
        told = sink.told()
        raise ValueError(f"{error}" + (f"; {told}" if told else "")) from error


def _check_pack(options: PredictOptions, place: RunOptions) -> None:
    ways = {"adapter": options.adapter, "adapter_column": options.adapter_column, "route": options.route}
    given = [name for name, value in ways.items() if value is not None]
    if not options.pack:
        if given or options.threshold is not None:
            name = [*given, "threshold"][0]
            raise ValueError(f"{name}: got it without --pack, expected a folder of adamix pack")
        if not place.run:
            raise ValueError("run: got nothing, expected --run and the folder of a run, or user/repo on the hub")
        return
    if place.run:
        raise ValueError("pack: got --run too, expected one of them")
    of_tasks = next((name for name in ("task_name", "task_column") if getattr(options, name)), None)
    if of_tasks:
        got = getattr(options, of_tasks)
        raise ValueError(f"{of_tasks}: got {got!r} with --pack, expected none: a pack has no gates by task")
    if len(given) != 1:
        got = " and ".join(f"--{name}" for name in given) or "nothing"
        raise ValueError(f"pack: got {got}, expected one of --adapter NAME, --adapter_column COLUMN, --route nearest")
    if options.adapter_column and not options.file:
        raise ValueError("adapter_column: got it for TEXT, expected --file, or --adapter NAME")
    if options.adapter_column and not has_columns(str(options.file)):
        raise ValueError(
            f"adapter_column: got {options.adapter_column!r} for {options.file}, expected a file with columns"
        )
    if options.threshold is not None and not options.route:
        raise ValueError("threshold: got it without --route nearest, expected both")


def _check(options: PredictOptions, words: Sequence[str]) -> None:
    if bool(options.file) == bool(words):
        got = "both" if words else "neither"
        raise ValueError(f"texts: got {got} of TEXT and --file, expected one of them")
    if options.pair and len(options.pair) != len(words):
        raise ValueError(f"pair: got {len(options.pair)} texts for {len(words)} TEXT, expected as many")
    if options.out and options.json:
        raise ValueError("json: got --json beside --out, expected one of them: --out writes JSON lines anyway")
    if (options.overwrite or options.resume) and not options.out:
        raise ValueError("out: got nothing, expected a file with --overwrite or --resume")
    if options.overwrite and options.resume:
        raise ValueError("resume: got --overwrite too, expected one of them")
    if options.out and options.file and same_file(options.out, options.file):
        raise ValueError(f"out: got {options.out!r}, which is --file, expected another file")
    at_least(1, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens, beams=options.beams)
