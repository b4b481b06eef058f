"""Labelled texts for the recipes: what tasks reads, GLUE's own files, STS-B's numbers, K-shot draws."""

from __future__ import annotations

import csv
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._extras import install_line
from ..tasks import TextClassification, TextSplit, load_text_classification

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Where GLUE's downloaded files keep things: columns by name, or by number where there is no header."""

    text: str | int
    pair: str | int | None
    label: str | int
    dev: str = "dev.tsv"


# The files of gluebenchmark.com; QNLI, RTE and SST-2 have the columns that load_text_classification knows.
GLUE_LAYOUTS = {
    "mnli": Layout("sentence1", "sentence2", "gold_label", "dev_matched.tsv"),
    "qqp": Layout("question1", "question2", "is_duplicate"),
    "mrpc": Layout("#1 String", "#2 String", "Quality"),
    "cola": Layout(3, None, 1),
    "stsb": Layout("sentence1", "sentence2", "score"),
}


def load_labelled(source: str, regression: bool = False) -> TextClassification:
    """Train and dev of a classification or regression set.

    Args:
        source: as for load_text_classification; or a folder of GLUE's own files (MNLI, QQP, MRPC, CoLA, STS-B are
            known by their columns). Rows that have fewer columns than the header, as a few of QQP do, are left
            out, and a warning counts them.
        regression: labels are numbers, as in STS-B; label_names is then ["score"].

    Raises ValueError, FileNotFoundError, ModuleNotFoundError as load_text_classification does.
    """
    folder = Path(source)
    if folder.is_dir() and (layout := _glue_layout(folder)) is not None:
        splits = [_read(folder / name, layout) for name in ("train.tsv", layout.dev)]
        return _numbered(source, splits, regression)
    if not regression:
        return load_text_classification(source)
    return _numbered(source, _plain_splits(source), regression=True)


def draw_shots(split: TextSplit, shots: int, seed: int) -> TextSplit:
    """`shots` rows of a split, drawn by the seed, as evenly over the classes as goes; in the split's order.

    Raises ValueError when a class has fewer rows than its share, or there are fewer shots than classes.
    """
    labels = sorted(set(split.labels))
    if shots < len(labels):
        raise ValueError(f"shots: got {shots} for {len(labels)} classes, expected at least one for each")
    generator, chosen = random.Random(seed), []
    for i, label in enumerate(labels):
        rows = [row for row, value in enumerate(split.labels) if value == label]
        share = shots // len(labels) + (i < shots % len(labels))
        if len(rows) < share:
            raise ValueError(f"shots: got {shots}, but label {label} has {len(rows)} training rows, expected {share}")
        chosen += generator.sample(rows, share)
    return take(split, sorted(chosen))


def take(split: TextSplit, rows: list[int]) -> TextSplit:
    """Some rows of a split."""
    pairs = None if split.pairs is None else [split.pairs[i] for i in rows]
    return TextSplit([split.texts[i] for i in rows], pairs, [split.labels[i] for i in rows])


def _glue_layout(folder: Path) -> Layout | None:
    train = folder / "train.tsv"
    if not train.is_file():
        return None
    with train.open(encoding="utf-8-sig") as file:
        header = file.readline().rstrip("\r\n").split("\t")
    for layout in GLUE_LAYOUTS.values():
        wanted = [c for c in (layout.text, layout.pair, layout.label) if c is not None]
        if all(isinstance(c, str) and c in header for c in wanted):
            return layout
    # CoLA has no header: source, label, the author's mark, sentence.
    cola = len(header) == 4 and header[1] in ("0", "1") and header[2] in ("", "*")
    return GLUE_LAYOUTS["cola"] if cola else None


def _read(path: Path, layout: Layout) -> tuple[list[str], list[str] | None, list[str]]:
    """(texts, pairs, labels as written) of one file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if isinstance(layout.text, str):
        header, rows = rows[0], rows[1:]
        missing = [c for c in (layout.text, layout.pair, layout.label) if c is not None and c not in header]
        if missing:
            raise ValueError(f"{path}: no column {missing[0]!r}, the columns are {', '.join(map(repr, header))}")
        text, label = header.index(layout.text), header.index(str(layout.label))
        pair = None if layout.pair is None else header.index(str(layout.pair))
    else:
        text, label = layout.text, int(layout.label)
        pair = None if layout.pair is None else int(layout.pair)
    last = max(c for c in (text, pair, label) if c is not None)
    whole = [row for row in rows if len(row) > last]
    if len(whole) < len(rows):
        logger.warning("%s: %d rows with too few columns left out", path, len(rows) - len(whole))
    pairs = None if pair is None else [row[pair] for row in whole]
    return [row[text] for row in whole], pairs, [row[label] for row in whole]


def _plain_splits(source: str) -> list[tuple[list[str], list[str] | None, list[str]]]:
    """Train and dev of a set whose column `label` holds numbers: a folder of TSV files, or a hub data set."""
    folder = Path(source)
    if (folder / "train.tsv").is_file():
        return [_read(folder / name, Layout("sentence1", "sentence2", "label")) for name in ("train.tsv", "dev.tsv")]
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data: {source!r} is no folder; the hub needs the package datasets: {install_line('train')}"
        ) from error
    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:
        raise ValueError(f"data: datasets.load_dataset refused {source!r}: {str(error).splitlines()[0]}") from error
    return [
        (loaded[s]["sentence1"], loaded[s]["sentence2"], [str(v) for v in loaded[s]["label"]])
        for s in ("train", "validation")
    ]


def _numbered(source: str, splits: list[Any], regression: bool) -> TextClassification:
    """Numbers as floats, or class names as their places in alphabetical order."""
    if regression:
        made = [TextSplit(list(t), p, [float(v) for v in labels]) for t, p, labels in splits]
        return TextClassification(source, ["score"], *made)
    names = sorted(set(splits[0][2]))
    unknown = sorted({v for _, _, labels in splits for v in labels} - set(names))
    if unknown or len(names) < 2:
        raise ValueError(f"{source}: got the labels {names} in training and {unknown} besides, expected at least two")
    ids = {name: i for i, name in enumerate(names)}
    return TextClassification(source, names, *(TextSplit(t, p, [ids[v] for v in labels]) for t, p, labels in splits))
