"""read_inputs: texts to predict for, one at a time, from a file of any size."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._columns import text_columns
from ._rows import PLAIN, SUFFIXES, Rows, cut_end, open_rows, text_lines
from ._table import listed
from .reading import checked_text

STDIN = "-"


@dataclass(frozen=True)
class InputRow:
    """text, the second text of a pair or None, and where they stand: "in.csv, line 3". name: of the adapter in a pack,
    where a column tells it."""

    text: str
    pair: str | None
    place: str
    name: str | None = None


def read_inputs(
    path: str | Path,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    name_column: str | None = None,
) -> Iterator[InputRow]:
    """Reads a file row by row; a file of millions needs no more memory than one of ten (but for .json, read whole).

    Args:
        path: .txt, one text a line (an empty line is an empty text, so that answers stay in line; the end of the last
            line begins no other); .csv, .tsv, .jsonl, .json and .parquet as load_task reads them, where a line of
            JSONL may also be a text alone; "-" is standard input, read as .txt.
        text_column, text_pair_column: by the columns' names where None, as in load_task; a .txt file has none.
        name_column: of the adapter's name; only a table has one.

    Raises:
        FileNotFoundError: no such file; at the call.
        ValueError: another kind of file, at the call; and when the row is reached that cannot be read, after those
            before it were given: the message has the file, the line and what was expected.
    """
    if name_column is not None and not has_columns(str(path)):
        raise ValueError(f"name_column: got {name_column!r} for {path}, expected a file with columns")
    if str(path) == STDIN:
        return _lines(sys.stdin.buffer, "standard input")
    file = Path(path).expanduser()
    suffix = file.suffix.lower()
    if suffix not in (".txt", *SUFFIXES):
        raise ValueError(f"{path}: got a file of type {suffix!r}, expected one of .txt, {', '.join(SUFFIXES)}")
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if suffix == ".txt":
        return _text_file(file)
    return _table_file(file, text_column, text_pair_column, name_column)


def has_columns(path: str) -> bool:
    """Whether read_inputs reads `path` as a table, and not as a text a line."""
    return path != STDIN and not path.lower().endswith(".txt")


def _text_file(path: Path) -> Iterator[InputRow]:
    with path.open("rb") as file:
        yield from _lines(file, str(path))


def _lines(file: Iterable[bytes], name: str) -> Iterator[InputRow]:
    for number, line in text_lines(file, name):
        yield InputRow(cut_end(line), None, f"{name}, line {number}")


def _table_file(path: Path, text: str | None, pair: str | None, name: str | None) -> Iterator[InputRow]:
    with open_rows(path) as found:
        chosen: tuple[str, str | None] | None = None
        for number, row in found.rows:
            place = found.place(number)
            if PLAIN in row and name is None:
                yield InputRow(checked_text(row[PLAIN], lambda place=place: place), None, place)
                continue
            if chosen is None:
                names = list(row) if found.columns == [PLAIN] else found.columns
                chosen = _texts(found.name, names, text, pair, name)
            first, second = chosen
            yield InputRow(
                _cell(row, first, found, number),
                None if second is None else _cell(row, second, found, number),
                place,
                None if name is None else _cell(row, name, found, number),
            )


def _texts(
    file: str, names: list[str], text: str | None, pair: str | None, name: str | None
) -> tuple[str, str | None]:  # fmt: skip
    """The columns of the texts, none of which is that of the names. Raises ValueError for names that are no column, or
    the only one that can be the text."""
    if name is None:
        return text_columns(file, names, text, pair)
    if name not in names:
        raise ValueError(f"name_column: got {name!r}, but {file} has the columns {listed(names)}")
    others = [column for column in names if column != name]
    try:
        return text_columns(file, others if name not in (text, pair) else names, text, pair)
    except ValueError:
        if text is None and name in text_columns(file, names, text, pair):
            raise ValueError(
                f"name_column: got {name!r}, which {file} has its texts in, expected the column of the names, one of "
                f"{listed(others) or 'more columns'}"
            ) from None
        raise


def _cell(row: dict[str, Any], column: str, found: Rows, number: int) -> str:
    if column not in row:
        raise ValueError(f"{found.place(number)}: got no {column!r}, expected the columns {', '.join(found.columns)}")
    return checked_text(row[column], lambda: f"{found.place(number)}, column {column!r}")
