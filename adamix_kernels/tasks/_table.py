"""One part of a data set before it is known what its columns mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ._rows import PLAIN, open_rows


@dataclass(frozen=True)
class Table:
    """names: the columns. read: all values of one. numbers: the line or row of each, for messages.

    label_names: by column, the names that a hub data set gives its label ids. left_out: cut rows of GLUE's archive.
    """

    name: str
    unit: str
    names: list[str]
    numbers: Sequence[int]
    read: Callable[[str], list[Any]]
    label_names: dict[str, list[str]]
    left_out: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def column(self, name: str, option: str) -> list[Any]:
        """The values of one column. Raises ValueError naming those there are."""
        if name not in self.names:
            raise ValueError(
                f"{self.name}: no column {name!r}, the columns are {listed(self.names)} (another one: --{option})"
            )
        return self.read(name)

    def place(self, row: int) -> str:
        """Where row `row` (from 0) stands."""
        return f"{self.name}, {self.unit} {self.numbers[row]}"


def listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def read_table(path: Any) -> Table:
    """A whole file of SUFFIXES. Raises as open_rows does, and ValueError for a header without rows."""
    with open_rows(path, whole_only=False) as found:
        pairs = list(found.rows)
    rows = [row for _, row in pairs]
    if not rows:
        raise ValueError(f"{found.name}: got a header and no rows, expected at least one row")
    names = list(dict.fromkeys([*found.columns, *(key for row in rows for key in row)]))
    if PLAIN in names:
        number = next(number for number, row in pairs if PLAIN in row)
        raise ValueError(f"{found.place(number)}: got a text alone, expected an object with a label too")
    numbers = [number for number, _ in pairs]
    return Table(
        found.name, found.unit, names, numbers, lambda c: [row.get(c) for row in rows], {}, tuple(found.left_out)
    )
