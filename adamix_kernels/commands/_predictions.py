"""Where predictions go: a file of JSON lines that can be gone on with, or the terminal."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from ..models._files import lock, naming
from ..tasks import InputRow
from ._options import needs_file

TOLERANCE = 1e-3  # of a number that is predicted again
SUFFIX = ".jsonl"


class Sink(Protocol):
    """wants: whether a chunk is still to be predicted. write: takes it with its predictions. told: how far it came."""

    def wants(self, rows: Sequence[InputRow]) -> bool: ...

    def write(self, rows: Sequence[InputRow], predictions: Sequence[dict[str, Any]]) -> None: ...

    def told(self) -> str: ...


def chunks(rows: Iterator[InputRow], size: int) -> Iterator[tuple[list[InputRow], ValueError | None]]:
    """(`size` rows or what is left, None); before a row that cannot be read, those before it and its error."""
    while True:
        chunk: list[InputRow] = []
        try:
            for row in itertools.islice(rows, size):
                chunk.append(row)
        except ValueError as error:
            yield chunk, error
            return
        if not chunk:
            return
        yield chunk, None


def record(row: InputRow, prediction: dict[str, Any]) -> dict[str, Any]:
    return {"text": row.text, **({} if row.pair is None else {"pair": row.pair}), **prediction}


class Lines:
    """A JSON-lines file, a line a row, flushed after each chunk.

    Args:
        resume: go on behind the whole lines that are there. Their texts must be those of the input; the first chunk and
            one that was written in part are predicted again and must agree. So the file is that of one run.

    Attributes: count: rows in the file that this run wrote or found there.

    Raises ValueError for a name that does not end in .jsonl, a file that is there and may neither be replaced nor gone
    on with, or one that is of other texts or another run; OSError where nothing may be written.
    """

    def __init__(self, path: str, overwrite: bool = False, resume: bool = False):
        self._path, self.count = Path(path), 0
        self._replaces = overwrite or resume
        if self._path.suffix != SUFFIX:
            raise ValueError(f"out: got {path!r}, expected a name that ends in {SUFFIX}: predictions are JSON lines")
        if self._path.is_dir() or (self._path.exists() and not self._replaces):
            raise self._there()
        needs_file("out", path)
        self._old = self._path.open("rb") if resume and self._path.exists() else None
        self._kept_end = 0  # bytes of whole lines
        self._read = False  # to the end
        self._held: list[dict[str, Any]] = []  # stored records of the chunk at hand
        self._file: TextIO | None = None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self._path, self._path):  # on a full disk closing tries to write once more
            for file in (self._old, self._file):
                if file is not None:
                    file.close()

    def wants(self, rows: Sequence[InputRow]) -> bool:
        first = self.count == 0
        self._held = self._stored(rows)
        if len(self._held) < len(rows) or (first and self._held):
            return True
        self.count += len(rows)
        return False

    def write(self, rows: Sequence[InputRow], predictions: Sequence[dict[str, Any]]) -> None:
        for stored, row, prediction in zip(self._held, rows, predictions):
            if not _agree(stored, record(row, prediction)):
                raise ValueError(
                    f"out: {str(self._path)!r} has other predictions for {row.place}, expected those of this run: "
                    "another run or other options wrote it; --overwrite replaces it"
                )
        held = len(self._held)
        self.count += held
        fresh = [record(row, prediction) for row, prediction in zip(rows[held:], predictions[held:])]
        if fresh:
            file = self._opened()
            with naming(self._path, self._path):
                file.writelines(json.dumps(values, ensure_ascii=False) + "\n" for values in fresh)
                file.flush()
            self.count += len(fresh)

    def complete(self) -> None:
        """After the last chunk. Raises ValueError where the file has more lines than the input."""
        if self._next_line() is not None:
            raise ValueError(
                f"out: {str(self._path)!r} has more than the {self.count} rows of the input, expected a file of its "
                "beginning; --overwrite replaces it"
            )
        self._opened()

    def told(self) -> str:
        if not self.count:
            return ""
        return f"{self.count} rows are in {self._path}, and --resume goes on behind them"

    def _stored(self, rows: Sequence[InputRow]) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            values = self._next_line()
            if values is None:
                break
            if (values.get("text"), values.get("pair")) != (row.text, row.pair):
                raise ValueError(
                    f"out: {str(self._path)!r} has another text than {row.place}, expected predictions of this input; "
                    "--overwrite replaces it"
                )
            found.append(values)
        return found

    def _next_line(self) -> dict[str, Any] | None:
        if self._old is None or self._read:
            return None
        line = self._old.readline()
        if not line.endswith(b"\n"):  # the end, or a line that was cut; from here on it grows
            self._read = True
            return None
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise ValueError(f"out: {str(self._path)!r} has a line that is no prediction; --overwrite replaces it")
        self._kept_end = self._old.tell()
        return values

    def _opened(self) -> TextIO:
        if self._file is None:
            self._file = self._alone()
            if self._path.is_file():
                self._file.truncate(self._kept_end)
        return self._file

    def _alone(self) -> TextIO:
        """Opens it for this process alone. Raises ValueError where another made it meanwhile, or is writing to it."""
        try:
            file = self._path.open("a" if self._replaces else "x", encoding="utf-8")
        except FileExistsError:
            raise self._there() from None
        if not lock(file.fileno()):
            file.close()
            raise ValueError(f"out: got {str(self._path)!r}, to which another adamix predict is writing")
        return file

    def _there(self) -> ValueError:
        return ValueError(
            f"out: {str(self._path)!r} is there already, expected another name, --overwrite, or --resume"
        )  # fmt: skip


class Printed:
    """Readable lines, a table on a terminal, or JSON lines."""

    def __init__(self, file: TextIO, as_json: bool):
        self._file, self._json = file, as_json

    def wants(self, rows: Sequence[InputRow]) -> bool:
        return True

    def write(self, rows: Sequence[InputRow], predictions: Sequence[dict[str, Any]]) -> None:
        if self._json:
            for row, prediction in zip(rows, predictions, strict=True):
                self._file.write(json.dumps(record(row, prediction), ensure_ascii=False) + "\n")
        elif "adapter" in predictions[0] or not (self._file.isatty() and _table(self._file, rows, predictions)):
            for row, prediction in zip(rows, predictions, strict=True):
                self._file.write("\t".join((*_words(prediction), _text(row))) + "\n")
        self._file.flush()

    def told(self) -> str:
        return ""


def _words(prediction: dict[str, Any]) -> tuple[str, ...]:
    named = () if "adapter" not in prediction else (prediction["adapter"] or "-",)
    if "generated" in prediction:
        return (*named, prediction["generated"])
    if "score" in prediction:
        return (*named, f"{prediction['score']:.4f}")
    label = prediction["label"]
    if label is None:  # refused by a pack's threshold
        return (*named, "-", "-")
    return *named, label, f"{prediction['probabilities'][label]:.4f}"


def _text(row: InputRow) -> str:
    text = row.text if row.pair is None else f"{row.text} | {row.pair}"
    return " ".join(text.split())


def _table(file: TextIO, rows: Sequence[InputRow], predictions: Sequence[dict[str, Any]]) -> bool:
    """False where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        return False
    heads = {"generated": ("generated",), "score": ("score",), "label": ("label", "probability")}
    table = Table(*heads[next(iter(predictions[0]))], "text")
    for row, prediction in zip(rows, predictions, strict=True):
        table.add_row(*map(Text, (*_words(prediction), _text(row))))
    Console(file=file).print(table)
    return True


def _agree(stored: Any, fresh: Any) -> bool:
    if isinstance(stored, dict) and isinstance(fresh, dict):
        return stored.keys() == fresh.keys() and all(_agree(stored[key], fresh[key]) for key in fresh)
    if isinstance(stored, float) or isinstance(fresh, float):
        return isinstance(stored, (int, float)) and abs(stored - fresh) <= TOLERANCE * max(1.0, abs(fresh))
    return bool(stored == fresh)
