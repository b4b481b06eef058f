"""Tab-separated tables that know where each row came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Columns of strings, and how to name a row in an error message."""

    name: str
    columns: dict[str, list[str]]
    first_line: int = 2
    unit: str = "line"
    label_names: list[str] | None = None

    def has(self, column: str) -> bool:
        return column in self.columns

    def column(self, name: str) -> list[str]:
        """The values of one column. Raises ValueError naming the columns there are."""
        if name not in self.columns:
            raise ValueError(f"{self.name}: no column {name!r}, the columns are {', '.join(map(repr, self.columns))}")
        return self.columns[name]

    def place(self, row: int) -> str:
        """Where row `row` (from 0) stands, for a message."""
        return f"{self.name}, {self.unit} {row + self.first_line}"


def read_tsv(path: Any) -> Table:
    """Reads UTF-8 text, one row a line, tabs between columns, a header first; quotes are ordinary characters.

    Args:
        path: a pathlib.Path or an importlib.resources file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, no rows, a repeated or empty column name, or a row with another number of
            columns than the header; the message names the file and the line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8") from None
    # Only "\n" ends a row: str.splitlines would also split at characters that occur inside sentences.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) < 2:
        raise ValueError(f"{path}: got {len(lines)} lines, expected a header and at least one row")
    header = lines[0].split("\t")
    if len(set(header)) < len(header) or "" in header:
        raise ValueError(f"{path}, line 1: the header {header} has an empty or repeated column name")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        row = line.split("\t")
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: got {len(row)} columns, the header has {len(header)}")
        rows.append(row)
    return Table(str(path), {name: [row[i] for row in rows] for i, name in enumerate(header)})
