"""What stands in a label column: class names, numbers, or texts to write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ._table import Table, listed

SCORE = "score"  # the one output of a regression
_MANY = 20  # classes that are all integers: rather a number to predict
_UNLABELLED = -1  # a class id of the hub for "nobody knows"
_NO_GOLD = "-"  # the same in SNLI's and MNLI's gold_label


@dataclass(frozen=True)
class Labels:
    """How the labels of every split are read; made from the training part by `labels_of`."""

    kind: str
    column: str
    names: list[str]  # in id order; [SCORE] in a regression, [] in a generation
    notes: list[str] = field(default_factory=list)
    hint: str = ""  # for errors: what these labels rather are

    def of(self, table: Table) -> tuple[list[int], list[Any]]:
        """(rows, labels): the rows that have a label, and ids, numbers or lists of texts for them.

        Raises ValueError for a label that cannot be, with its place.
        """
        values = table.column(self.column, "label_column")
        rows = _labelled(table, self.column, values)
        if not rows:
            raise ValueError(f"{table.name}, column {self.column!r}: got no labelled row, expected at least one")
        read = {"classification": self._id, "regression": self._number, "generation": self._texts}[self.kind]
        return rows, [read(table, row, values[row]) for row in rows]

    def _id(self, table: Table, row: int, value: Any) -> int:
        name = class_name(table, row, self.column, value)
        try:
            return self._ids[name]
        except KeyError:
            known = listed(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
            raise ValueError(
                f"{_where(table, row, self.column)}: got {name!r}, expected one of the training labels: {known}; "
                f"mend or remove the row, or add such rows to the training part{self.hint}"
            ) from None

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def _number(self, table: Table, row: int, value: Any) -> float:
        number = math.nan if isinstance(value, bool) else _number(value)
        if not math.isfinite(number):
            raise ValueError(
                f"{_where(table, row, self.column)}: got {_shown(value)}, expected a number; mend or remove the row, "
                "or train for classes (task classification)"
            )
        return number

    def _texts(self, table: Table, row: int, value: Any) -> list[str]:
        texts = value if isinstance(value, (list, tuple)) else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"{_where(table, row, self.column)}: got {_shown(value)}, expected a text to write, or a list of them; "
                "mend or remove the row"
            )
        return list(texts)


def labels_of(train: Table, column: str, kind: str) -> Labels:
    """Reads the training labels and decides, for kind "auto", between classes and numbers.

    Raises ValueError for a missing label, labels of several types, numbers where classes are wanted, or one class.
    """
    values = train.column(column, "label_column")
    if kind == "generation":
        return Labels(kind, column, [])
    notes: list[str] = []
    rows = _labelled(train, column, values)
    if kind == "auto":
        kind, more = _decide(train, column, [(row, values[row]) for row in rows])
        notes += more
    if kind == "regression":
        return Labels(kind, column, [SCORE], notes)
    names = _class_names(train, column, [(row, values[row]) for row in rows], notes)
    if len(names) < 3 or 2 * len(names) <= len(rows) or not any(" " in name.strip() for name in names):
        return Labels(kind, column, names, notes)
    notes.append(f"{len(names)} classes are trained on {len(rows)} rows; for texts to write: --task generation.")
    hint = f"; {len(names)} different labels in {len(rows)} rows may be texts to write: --task generation"
    return Labels(kind, column, names, notes, hint)


def class_name(table: Table, row: int, column: str, value: Any) -> str:
    """The name of a class: a name of the hub's, a string as it stands, 1 for 1 and 1.0, true and false."""
    if column in table.label_names and isinstance(value, int):
        return table.label_names[column][value]
    if _missing(value):
        raise ValueError(
            f"{_where(table, row, column)}: got {_shown(value)}, expected a label; fill it in or remove the row"
        )
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, str)) and not _fraction(value):
        whole = isinstance(value, str) and not _is_integer(value) and math.isfinite(_number(value))
        return str(int(_number(value))) if whole else str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    expected = "a class: a name or an integer (task regression learns numbers)"
    raise ValueError(f"{_where(table, row, column)}: got {_shown(value)}, expected {expected}")


def unlabelled(table: Table, column: str | None) -> bool:
    """Whether no row has a label: no such column, nothing in it, or -1 throughout, as in published test parts."""
    if column is None or column not in table.names:
        return True
    return all(_missing(value) or value in (_UNLABELLED, str(_UNLABELLED)) for value in table.column(column, ""))


def _decide(table: Table, column: str, values: Sequence[tuple[int, Any]]) -> tuple[str, list[str]]:
    """Classes or numbers: numbers where some are no integers. A few words among such numbers are a mistake."""
    if column in table.label_names:
        return "classification", []
    known = [(row, value) for row, value in values if not _missing(value) and not isinstance(value, bool)]
    fraction = next((value for _, value in known if _fraction(value)), None)
    if fraction is None:
        return "classification", []
    word = next(((row, value) for row, value in known if not math.isfinite(_number(value))), None)
    if word is not None:
        raise ValueError(
            f"{_where(table, word[0], column)}: got {_shown(word[1])} among numbers such as {fraction}, expected "
            "numbers alone, or integers and names alone; mend or remove the row"
        )
    return "regression", [
        f"The labels in {column!r} are numbers ({fraction}, ...): a regression is trained (task regression)."
    ]


def _class_names(table: Table, column: str, values: Sequence[tuple[int, Any]], notes: list[str]) -> list[str]:
    first = values[0][1] if values else None
    for row, value in values:
        if not _missing(value) and not _missing(first) and _type(value) != _type(first):
            raise ValueError(
                f"{_where(table, row, column)}: got {_shown(value)}, {_type(value)}, after {_shown(first)}, "
                f"{_type(first)}, expected labels of one type"
            )
    names = list(dict.fromkeys(class_name(table, row, column, value) for row, value in values))
    bare = {name.strip(): name for name in names}
    if len(bare) < len(names):
        odd = next(name for name in names if bare[name.strip()] != name)
        raise ValueError(
            f"{table.name}, column {column!r}: got the labels {odd!r} and {bare[odd.strip()]!r}, which differ in "
            "spaces alone, expected one spelling"
        )
    if len(names) < 2:
        raise ValueError(
            f"{table.name}, column {column!r}: got {len(names)} distinct labels ({listed(names)}), expected at least 2 "
            "(another column: --label_column)"
        )
    cases: dict[str, list[str]] = {}
    for name in names:
        cases.setdefault(name.casefold(), []).append(name)
    alike = [name for group in cases.values() if len(group) > 1 for name in group]
    if alike:
        notes.append(f"The labels {listed(alike[:4])} in {column!r} differ in case alone, and are classes apart.")
    if column in table.label_names:
        return [name for name in table.label_names[column] if name in names]
    whole = [name for name in names if _is_integer(name)]
    if len(whole) == len(names):
        if len(names) > _MANY:
            notes.append(f"{len(names)} classes are trained, all integers; for a number to predict: task regression.")
        return sorted(names, key=int)
    if whole:
        words = [name for name in names if name not in whole]
        notes.append(f"The labels in {column!r} are names, as {listed(words[:3])} among integers are no numbers.")
    return sorted(names)


def _labelled(table: Table, column: str, values: Sequence[Any]) -> list[int]:
    if column in table.label_names:
        return [row for row, value in enumerate(values) if value is None or value != _UNLABELLED]
    if column == "gold_label":
        return [row for row, value in enumerate(values) if value != _NO_GOLD]
    return list(range(len(values)))


def _missing(value: Any) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and (not value.strip() or value.strip().casefold() == "nan")


def _number(value: Any) -> float:
    """NaN for what is no number."""
    if isinstance(value, str) and "_" in value:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _fraction(value: Any) -> bool:
    number = _number(value)
    return math.isfinite(number) and not number.is_integer()


def _is_integer(value: str) -> bool:
    return value.removeprefix("-").isdecimal()


def _type(value: Any) -> str:
    """Integers and other numbers are one type."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), f"a {type(value).__name__}")


def _where(table: Table, row: int, column: str) -> str:
    return f"{table.place(row)}, column {column!r}"


def _shown(value: Any) -> str:
    return "nothing" if value is None or value == "" else f"{value!r:.60}"
