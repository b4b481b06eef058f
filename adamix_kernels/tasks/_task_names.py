"""Which task each row is of, for gates by task: names of one column, numbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._table import Table, listed

OPTION = "task_column"
_LIMIT = 1000  # a column with more names is no column of tasks


@dataclass(frozen=True)
class TaskNames:
    """names: in id order, alphabetically as the training part has them."""

    column: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, train: Table, column: str) -> TaskNames:
        """Raises ValueError: no such column, an empty cell, one task alone, or more than 1000."""
        found = sorted({_name(train, row, column, v) for row, v in enumerate(train.column(column, OPTION))})
        if not 2 <= len(found) <= _LIMIT:
            raise ValueError(
                f"{OPTION}: got {column!r} of {train.name} with {len(found)} different names, expected 2 to {_LIMIT} "
                "tasks; without --task_column the gates need none"
            )
        return cls(column, tuple(found))

    def ids(self, table: Table, rows: Sequence[int]) -> list[int]:
        values = table.column(self.column, OPTION)
        return [
            self.id(_name(table, row, self.column, values[row]), f"{table.place(row)}, column {self.column!r}")
            for row in rows
        ]

    def id(self, name: str, place: str) -> int:
        """Raises ValueError, beginning with `place`, for a task that the training did not see."""
        if name not in self.names:
            raise ValueError(f"{place}: got the task {name!r}, expected one of the training's {listed(self.names)}")
        return self.names.index(name)


def _name(table: Table, row: int, column: str, value: Any) -> str:
    if value is None or isinstance(value, (float, list, dict)) or not str(value).strip():
        raise ValueError(f"{table.place(row)}, column {column!r}: got {value!r:.60}, expected the name of a task")
    return str(value)
