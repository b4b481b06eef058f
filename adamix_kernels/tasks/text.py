"""Text-classification data: the embedded set, a GLUE-style TSV folder, or a hub dataset."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._extras import install_line
from ._tsv import Table, read_tsv

EMBEDDED = "remarks"
# GLUE's own column names, then the commonest ones outside it; the first pair whose columns are all there counts.
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
    ("sentence", None),
    ("text", None),
)
_DEV_SPLITS = ("validation", "validation_matched", "dev", "test")


@dataclass(frozen=True)
class TextSplit:
    """One split: texts, the second text of each pair (None for single sentences), labels (numbers in a regression)."""

    texts: list[str]
    pairs: list[str] | None
    labels: Sequence[int | float]

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, rows: int | None) -> TextSplit:
        """The first `rows` rows; all of them when rows is None."""
        return TextSplit(self.texts[:rows], None if self.pairs is None else self.pairs[:rows], self.labels[:rows])


@dataclass(frozen=True)
class TextClassification:
    """A classification task: label i is called label_names[i] in every split."""

    name: str
    label_names: list[str]
    train: TextSplit
    dev: TextSplit
    test: TextSplit | None = None

    @property
    def num_labels(self) -> int:
        return len(self.label_names)


def load_text_classification(source: str = EMBEDDED) -> TextClassification:
    """Reads train, dev and, where there is one, test.

    Args:
        source: "remarks" (the set that ships with this package); or a folder with train.tsv, dev.tsv and
            optionally test.tsv: tab-separated UTF-8 without quoting, a header line, the columns `label` and
            `sentence`, or one of the pairs in TEXT_COLUMNS; or whatever `datasets.load_dataset` accepts: a
            hub name ("stanfordnlp/sst2"), with its configuration after a colon ("nyu-mll/glue:rte"), or a
            folder of CSV, JSON or Parquet files.

    Labels may be integers or names. Where they are all integers they are numbered in ascending order,
    names alphabetically; the training split decides which labels exist. A test split without labels
    (a missing column, or all -1 as on the hub) is left out.

    Raises:
        FileNotFoundError: the folder lacks train.tsv or dev.tsv.
        ValueError: a file is malformed, a column is missing or a label is unknown (the message names the
            file, the line and the column), or the hub cannot give the data set.
        ModuleNotFoundError: a hub name, and the package `datasets` is not installed.
    """
    if source == EMBEDDED:
        folder = importlib.resources.files(__package__) / "data"
        tables = [read_tsv(folder / f"{EMBEDDED}_{split}.tsv") for split in ("train", "dev")]
        return _from_tables(source, [*tables, None])
    path = Path(source)
    if (path / "train.tsv").is_file() or (path / "dev.tsv").is_file():
        tables = [read_tsv(path / "train.tsv"), read_tsv(path / "dev.tsv")]
        test = read_tsv(path / "test.tsv") if (path / "test.tsv").is_file() else None
        return _from_tables(source, [*tables, test])
    return _from_tables(source, _hub_tables(source))


def _from_tables(name: str, tables: Sequence[Table | None]) -> TextClassification:
    train, dev, test = tables
    assert train is not None  # only the test split may be absent
    assert dev is not None
    values = sorted(set(train.column("label")))
    if all(_is_integer(v) for v in values):
        values.sort(key=int)
    elif any(_is_float(v) for v in values):
        row = next(i for i, v in enumerate(train.column("label")) if _is_float(v) and not _is_integer(v))
        value = train.column("label")[row]
        raise ValueError(
            f"{train.place(row)}, column 'label': got {value!r}, expected a class (regression is not supported here)"
        )
    if len(values) < 2:
        raise ValueError(f"{train.name}, column 'label': got {len(values)} distinct labels, expected at least 2")
    names = [train.label_names[int(v)] for v in values] if train.label_names else values
    ids = {value: i for i, value in enumerate(values)}
    if test is not None and (not test.has("label") or set(test.column("label")) <= {"-1"}):
        test = None
    return TextClassification(name, names, _split(train, ids), _split(dev, ids), _split(test, ids) if test else None)


def _split(table: Table, ids: dict[str, int]) -> TextSplit:
    first, second = next(
        (pair for pair in TEXT_COLUMNS if all(c is None or table.has(c) for c in pair)), ("sentence", None)
    )
    labels = []
    for row, value in enumerate(table.column("label")):
        if value not in ids:
            known = ", ".join(map(repr, list(ids)[:8]))
            raise ValueError(
                f"{table.place(row)}, column 'label': got {value!r}, expected one of the training labels: {known}"
            )
        labels.append(ids[value])
    return TextSplit(table.column(first), None if second is None else table.column(second), labels)


def _is_integer(value: str) -> bool:
    return value.removeprefix("-").isdecimal()


def _is_float(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _hub_tables(source: str) -> list[Table | None]:
    # A hub name is "name" or "owner/name"; asking the hub for a mistyped path would take it half a minute.
    looks_local = source.startswith((".", "/", "~", "\\")) or source.count("/") > 1
    if looks_local and not Path(source).exists():
        raise FileNotFoundError(f"data: {source!r}: no such folder")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data: {source!r} is neither {EMBEDDED!r} nor a folder with train.tsv and dev.tsv; reading it from the "
            f"hub needs the package datasets: {install_line('train')}"
        ) from error
    name, config = source, None
    if not Path(source).exists() and ":" in source:
        name, config = source.split(":", 1)
    try:
        splits = datasets.load_dataset(name, config)
    except Exception as error:
        raise ValueError(
            f"data: {source!r} is neither {EMBEDDED!r} nor a folder with train.tsv and dev.tsv, and "
            f"datasets.load_dataset refused it: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    dev = next((s for s in _DEV_SPLITS if s in splits), None)
    if "train" not in splits or dev is None:
        raise ValueError(f"data: {source!r} has the splits {sorted(splits)}, expected train and one of {_DEV_SPLITS}")
    test = "test" if "test" in splits and dev != "test" else None
    return [_hub_table(source, s, splits[s]) if s else None for s in ("train", dev, test)]


def _hub_table(source: str, split: str, rows: Any) -> Table:
    label_names = getattr(rows.features.get("label"), "names", None)
    columns = {c: [str(v) for v in rows[c]] for c in rows.column_names}
    return Table(f"{source}, split {split}", columns, first_line=1, unit="row", label_names=label_names)
