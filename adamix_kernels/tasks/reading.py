"""load_task: the one reader of labelled data, for every command, recipe and example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._columns import choose_columns
from ._draw import dev_rows
from ._labels import Labels, labels_of, unlabelled
from ._sources import EMBEDDED, PARTS, Parts, find_parts, is_file
from ._table import Table
from ._task_names import TaskNames
from .table_data import find_tables, rows_as_text
from .text import KINDS, Columns, TextSplit, TextTask

TASKS = ("auto", *KINDS)


def load_task(
    source: str = EMBEDDED,
    *,
    task: str = "auto",
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    dev_fraction: float = 0.1,
    seed: int = 0,
    task_column: str | None = None,
) -> TextTask:
    """Reads train, dev and, where there is one, test.

    Args:
        source: "remarks" (the set that ships with this package); or a file, .tsv, .csv, .jsonl, .json or .parquet (see
            below); or a folder of them: train, dev (or validation, valid, val) and test, and GLUE's archives under
            their own names (dev_matched.tsv, in_domain_train.tsv); or a folder that `datasets` saved; or a hub name
            ("stanfordnlp/sst2"), its configuration after a colon ("nyu-mll/glue:rte").
        task: "classification", "regression", "generation", or "auto": a regression where labels are numbers and not
            all of them integers, else a classification; never a generation.
        text_column, text_pair_column, label_column: where to look; by the columns' names where None, with an error
            where several fit. In a generation text_column is what is read and label_column what is to be written (a
            text, or a list of them: several references).
        dev_fraction: where there is no dev part, this share of the training rows becomes one, drawn by `seed`:
            each class in proportion, rows of the same text on the same side. A test part is never taken for it.
        task_column: a column of names or numbers that says which task a row is of, for gates by task; the training part
            decides which there are. Not in a generation.

    TSV is a header line, tabs, and quotes that mean nothing, as in GLUE's files; CSV has quotes; JSONL is an object a
    line. Text is UTF-8. Classes are integers, numbered in ascending order, or names, alphabetically; true and false are
    names. The training part decides which there are. A test part without labels (a missing column, or all -1 as on the
    hub) is left out. A generation also reads the folders of load_tables (E2E, WebNLG, DART) and their hub rows.

    What a person should know about all this is in `notes` of the result; the columns are in `columns`.

    Raises:
        FileNotFoundError: no such file or folder, or a folder without a training part.
        ValueError: a file is malformed; a column is missing or may be meant twice; a label is missing, of another type,
            no class, no number, or unknown to the training part; fewer than two classes; too few rows for a dev
            split; the hub cannot give the data set. The message names file, line, column and the way out.
        ModuleNotFoundError: a hub name, or a Parquet file, and the package for it is not installed.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(map(repr, TASKS))}")
    if not 0 < dev_fraction < 1:
        raise ValueError(f"dev_fraction: got {dev_fraction}, expected a share between 0 and 1")
    given = (text_column, text_pair_column, label_column)
    if task == "generation" and not any(given) and (tables := find_tables(source)) is not None:
        return TextTask(source, task, [], *tables)
    if task_column is not None and (task == "generation" or task_column in given):
        wanted = "none in a generation" if task == "generation" else "another column than text and label"
        raise ValueError(f"task_column: got {task_column!r}, expected {wanted}")
    parts = find_parts(source)
    tasks: tuple[str, ...] = ()
    hint = ""
    if task == "generation" and not any(given) and (written := _written(parts)) is not None:
        columns, names, kind, notes, (train, dev, test) = Columns(None, None, None), [], task, [*parts.notes], written
    else:
        columns, notes = choose_columns(parts.train.name, _others(parts.train, task_column), task, *given)
        labels = labels_of(parts.train, str(columns.label), task)
        names, kind, hint = labels.names, labels.kind, labels.hint
        notes = [*parts.notes, *notes, *labels.notes]
        of = None if task_column is None else TaskNames.of(parts.train, task_column)
        tasks = () if of is None else of.names
        train, dev, test = (_split(table, columns, labels, notes, of) for table in _labelled(parts, columns, notes))
    assert train is not None  # a source without it is an error
    if dev is None:
        train, dev = _drawn(source, train, kind, dev_fraction, seed, notes, hint)
    return TextTask(source, kind, names, train, dev, test, columns, tuple(notes), tasks)


def load_split(
    source: str,
    split: str = "dev",
    *,
    task: str = "classification",
    label_names: Sequence[str] = (),
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    task_column: str | None = None,
    task_names: Sequence[str] = (),
) -> TextSplit:
    """Labelled rows for a model that is trained already: every row of a file, or one part of anything else.

    Args:
        source, text_column, text_pair_column, label_column: as in load_task.
        split: "train", "dev" or "test", of a source that has parts. None is drawn here: a part that load_task drew from
            the training rows comes from load_task alone, with the same seed.
        task: "classification", "regression" or "generation".
        label_names: the classes of the model, in id order. task_column, task_names: likewise, of gates by task.

    Raises as load_task, and ValueError for a label that is none of label_names, or a part that is not there.
    """
    if task not in KINDS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(map(repr, KINDS))}")
    if split not in PARTS:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(map(repr, PARTS))}")
    given = (text_column, text_pair_column, label_column)
    if task == "generation" and not any(given) and (tables := find_tables(source)) is not None:
        part: TextSplit = _there(source, split, dict(zip(PARTS, tables)))
        return part
    parts = find_parts(source)
    tables_of = {name: getattr(parts, name) for name in PARTS}
    table: Table = parts.train if is_file(source) else _there(source, split, tables_of)
    if task == "generation" and not any(given) and (written := rows_as_text(table)) is not None:
        return written
    columns, _ = choose_columns(table.name, _others(table, task_column), task, *given)
    of = None if task_column is None else TaskNames(task_column, tuple(task_names))
    made = _split(table, columns, Labels(task, str(columns.label), list(label_names)), [], of)
    assert made is not None  # as table is
    return made


def _there(source: str, split: str, parts: dict[str, Any]) -> Any:
    """One of the parts. Raises ValueError naming those there are."""
    if parts[split] is None:
        there = ", ".join(name for name, part in parts.items() if part is not None)
        raise ValueError(f"split: {source!r} has no {split} part, expected one of {there}")
    return parts[split]


def _written(parts: Parts) -> tuple[TextSplit | None, ...] | None:
    """The hub's rows of WebNLG or DART, whose texts stand in no column of their own."""
    if rows_as_text(parts.train) is None:
        return None
    return tuple(None if table is None else rows_as_text(table) for table in (parts.train, parts.dev, parts.test))


def _labelled(parts: Parts, columns: Columns, notes: list[str]) -> tuple[Table | None, ...]:
    test = parts.test
    if test is not None and unlabelled(test, columns.label):
        notes.append(f"{test.name}: it has no labels and is left out.")
        test = None
    return parts.train, parts.dev, test


def _others(table: Table, task_column: str | None) -> list[str]:
    return [name for name in table.names if name != task_column]


def _split(
    table: Table | None, columns: Columns, labels: Labels, notes: list[str], tasks: TaskNames | None = None
) -> TextSplit | None:
    if table is None:
        return None
    rows, values = labels.of(table)
    if len(rows) < len(table):
        notes.append(f"{table.name}: {len(table) - len(rows)} rows without a label are left out.")
    texts = _texts(table, str(columns.text), "text_column", rows)
    pairs = None if columns.pair is None else _texts(table, columns.pair, "text_pair_column", rows)
    empty = sum(not text.strip() for text in texts)
    if empty:
        notes.append(f"{table.name}: {empty} rows have an empty text in {columns.text!r}.")
    quoted = sum(_quoted(text) for text in texts) if table.name.endswith(".tsv") else 0
    if quoted:
        notes.append(
            f"{table.name}: {quoted} texts look quoted, but quotes mean nothing in a TSV file: save it as CSV."
        )
    if labels.kind != "generation":
        return TextSplit(texts, pairs, values, None if tasks is None else tasks.ids(table, rows))
    return TextSplit([t for t, v in zip(texts, values) for _ in v], pairs, [text for v in values for text in v])


def _texts(table: Table, column: str, option: str, rows: Sequence[int]) -> list[str]:
    values = table.column(column, option)
    return [checked_text(values[row], lambda row=row: f"{table.place(row)}, column {column!r}") for row in rows]


def _quoted(text: str) -> bool:
    """Whether a cell is as a program writes it that quotes: quotes around, and those inside twice."""
    inside = text[1:-1]
    return text[:1] == text[-1:] == '"' and '""' in inside and '"' not in inside.replace('""', "")


def checked_text(value: Any, place: Any) -> str:
    """The text itself. Raises ValueError, beginning with place(), for anything that no tokenizer reads."""
    if not isinstance(value, str):
        got = "nothing" if value is None else f"{value!r:.60}"
        raise ValueError(f"{place()}: got {got}, expected a text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{place()}: got {value!a:.60}, which has half of a surrogate pair in it") from None
    return value


def _drawn(
    source: str, train: TextSplit, kind: str, fraction: float, seed: int, notes: list[str], hint: str = ""
) -> tuple[TextSplit, TextSplit]:
    contents: list[Any] = list(train.texts) if train.pairs is None else list(zip(train.texts, train.pairs))
    classes = train.labels if kind == "classification" else [0] * len(train)
    chosen = dev_rows(contents, classes, fraction, seed)
    if not chosen:
        raise ValueError(
            f"data: {source!r} has no dev part, and its {len(set(contents))} different training texts are too few to "
            f"draw {fraction:g} of them for one, expected more rows, a dev part, or a greater dev_fraction{hint}"
        )
    aside = set(chosen)
    rest = [row for row in range(len(train)) if row not in aside]
    share = ", each class in proportion" if kind == "classification" else ""
    notes.append(
        f"There is no dev part: {len(chosen)} of {len(train)} training rows are kept for it (seed {seed}{share})."
    )
    return train.take(rest), train.take(chosen)
