"""Rows of one file, one at a time, each with the line it begins on: what training and prediction both read with."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .._extras import install_line

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
# The key of a JSON line that is a text and no object.
PLAIN = ""
# CoLA has no header: source, label, the author's mark, sentence.
COLA = ("source", "label", "mark", "sentence")
# A header that has one of these is of GLUE's archive, where a few rows (QQP's) are cut.
_ARCHIVE = ("gold_label", "qid1", "#1 ID", "old_index")
_LONGEST_CELL = 1 << 24


@dataclass
class Rows:
    """columns: of the header, or of the first JSON object. rows: (number, cells), where `number` is a line or row.

    left_out grows while rows are read: the numbers of those that were cut.
    """

    name: str
    unit: str
    columns: list[str]
    rows: Iterator[tuple[int, dict[str, Any]]]
    left_out: list[int] = field(default_factory=list)

    def place(self, number: int) -> str:
        return f"{self.name}, {self.unit} {number}"


@contextmanager
def open_rows(path: Any, whole_only: bool = True) -> Iterator[Rows]:
    """Opens a file of SUFFIXES; nothing but its first row is read before `rows` is.

    TSV: a header line, tabs between columns, quotes are ordinary characters (as GLUE's files are written); CoLA's
    files without a header are known by their first line. CSV: a header line, commas, quotes as RFC 4180 has them.
    JSONL: an object or a string a line. JSON: a list of these, or JSONL. Text is UTF-8, with or without a mark.

    Args:
        path: a pathlib.Path or an importlib.resources file.
        whole_only: False leaves the cut rows of GLUE's archive out; they are counted in left_out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, an empty file, a bad header; and, when `rows` reaches it, a row that cannot be
            read. The message has the file and the line.
        ModuleNotFoundError: a Parquet file without pyarrow.
    """
    name, suffix = str(path), path.name[path.name.rfind(".") :].lower() if "." in path.name else ""
    if suffix not in SUFFIXES:
        raise ValueError(f"{name}: got a file of type {suffix or 'none'!r}, expected one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file")
    if suffix == ".parquet":
        yield _parquet(path, name)
        return
    with path.open("rb") as file:
        if suffix == ".json" and _first_character(file) == b"[":
            yield _json_list(file, name)
        elif suffix in (".json", ".jsonl"):
            yield _json_lines(file, name)
        elif suffix == ".csv":
            yield _csv(file, name)
        else:
            yield _tsv(file, name, whole_only)


def text_lines(file: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    """(number, line with its end). Only "\\n" ends a line: others occur inside sentences."""
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}, line {number}: byte {error.start + 1} of the line is not UTF-8, expected a file saved "
                "as UTF-8"
            ) from None
        yield number, line.removeprefix("\ufeff") if number == 1 else line


def cut_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _tsv(file: Any, name: str, whole_only: bool) -> Rows:
    lines = ((number, cut_end(line)) for number, line in text_lines(file, name))
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{name}: got an empty file, expected a header line and rows")
    cells = first[1].split("\t")
    bare = len(cells) == len(COLA) and cells[1].isdecimal() and cells[2] in ("", "*")
    columns = list(COLA) if bare else _header(cells, name, ",;")
    cut_rows = not whole_only and any(column in columns for column in _ARCHIVE)
    found = Rows(name, "line", columns, iter(()))

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        if bare:
            yield first[0], dict(zip(columns, cells))
        blank: list[int] = []  # lines at the end are no rows; between rows they are
        for number, line in lines:
            if not line:
                blank.append(number)
                continue
            for place, text in [*((n, "") for n in blank), (number, line)]:
                row = text.split("\t")
                if len(row) == len(columns):
                    yield place, dict(zip(columns, row))
                elif cut_rows:
                    found.left_out.append(place)
                else:
                    raise ValueError(f"{name}, line {place}: got {_count(row)}, expected {len(columns)}{_quoted(row)}")
            blank = []

    found.rows = rows()
    return found


def _csv(file: Any, name: str) -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    reader = csv.reader((line for _, line in text_lines(file, name)), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(
                    f"{name}, line {start}: got a row that is no CSV ({error}), expected commas between cells, and "
                    'quotes around a cell with commas, quotes ("" inside) or line ends'
                ) from None
            if cells is None:
                return
            if cells:
                yield start, cells

    lines = rows()
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{name}: got an empty file, expected a header line and rows")
    columns = _header(first[1], name, ";\t")

    def named() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, cells in lines:
            if len(cells) != len(columns):
                raise ValueError(
                    f"{name}, line {number}: got {_count(cells)}, expected {len(columns)} as in the header "
                    "(a cell with commas needs quotes around it)"
                )
            yield number, dict(zip(columns, cells))

    return Rows(name, "line", columns, named())


def _json_lines(file: Any, name: str) -> Rows:
    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in text_lines(file, name):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{name}, line {number}: got no JSON ({error}), expected one object a line"
                    f"{', or a list of objects' if name.endswith('.json') else ''}"
                ) from None
            yield number, _object(value, f"{name}, line {number}")

    return _peeked(rows(), name, "line")


def _json_list(file: Any, name: str) -> Rows:
    try:
        values = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: got a file that is not JSON ({error})") from None
    rows = ((i, _object(value, f"{name}, row {i}")) for i, value in enumerate(values, start=1))
    return _peeked(rows, name, "row")


def _parquet(path: Any, name: str) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name}: Parquet files need the package pyarrow: {install_line('train')}") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name}: got a file that is not Parquet ({error})") from error

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{name}: got a damaged file, after row {number} ({error})") from error
        finally:
            file.close()

    return Rows(name, "row", list(file.schema_arrow.names), rows())


def _peeked(rows: Iterator[tuple[int, dict[str, Any]]], name: str, unit: str) -> Rows:
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{name}: got no rows, expected at least one object")

    def all_rows() -> Iterator[tuple[int, dict[str, Any]]]:
        yield first
        yield from rows

    return Rows(name, unit, list(first[1]), all_rows())


def _object(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {PLAIN: value}
    if not isinstance(value, dict):
        raise ValueError(f"{place}: got {value!r:.60}, expected an object of columns, or a string")
    return value


def _first_character(file: Any) -> bytes:
    start: bytes = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return start[:1]


def _header(cells: list[str], name: str, others: str) -> list[str]:
    if len(cells) == 1 and any(mark in cells[0] for mark in others):
        mark = next(mark for mark in others if mark in cells[0])
        raise ValueError(
            f"{name}, line 1: got one column, {cells[0]!r}, whose names seem to be separated by {mark!r}, expected "
            f"{'commas' if ',' not in others else 'tabs'}"
        )
    # pandas writes its index under an empty name.
    columns = [cell or f"column {i}" for i, cell in enumerate(cells, start=1)]
    if len(set(columns)) < len(columns):
        twice = next(c for c in columns if columns.count(c) > 1)
        raise ValueError(f"{name}, line 1: got the column {twice!r} twice, expected a header of different names")
    return columns


def _count(cells: list[str]) -> str:
    return f"{len(cells)} column{'s' if len(cells) != 1 else ''}"


def _quoted(cells: list[str]) -> str:
    quoted = any(cell.startswith('"') for cell in cells)
    return " (quotes mean nothing in a TSV file: save quoted cells as CSV)" if quoted else ""
