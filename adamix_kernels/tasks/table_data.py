"""Tables and the texts written about them: E2E's text files, WebNLG's and DART's JSON, or their rows on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._library import hub_splits
from ._rows import text_lines
from ._table import Table
from .text import TextSplit

FORMATS = ("e2e", "webnlg", "dart")
_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "e2e": {"train": ("train.txt",), "dev": ("valid.txt", "dev.txt"), "test": ("test.txt",)},
    "webnlg": {"train": ("train.json",), "dev": ("dev.json",), "test": ("test.json",)},
    "dart": {s: (f"dart-v1.1.1-full-{s}.json", f"{s}.json") for s in ("train", "dev", "test")},
}
_HUB_COLUMNS = {"webnlg": ("modified_triple_sets", "lex"), "dart": ("tripleset", "annotations")}
_HUB_SPLITS = {"train": ("train",), "dev": ("validation", "dev"), "test": ("test",)}
_SLOT = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]")


@dataclass(frozen=True)
class Pair:
    """A table in words, and one text about it. category: what it is about, where the data says so (WebNLG)."""

    context: str
    text: str
    category: str | None = None


@dataclass(frozen=True)
class TableData:
    """train: pairs. dev, test: pairs too; several of one context are its references."""

    name: str
    train: list[Pair]
    dev: list[Pair]
    test: list[Pair] | None

    @property
    def judged(self) -> list[Pair]:
        """What generated texts are compared with: the test part, dev where there is none."""
        return self.dev if self.test is None else self.test

    def parts(self, contexts: Sequence[str]) -> dict[str, list[int]]:
        """Numbers of the contexts whose category the training part has ("seen") or has not ("unseen"), as WebNLG is
        scored; {} where one of the two would be empty."""
        trained = {pair.category for pair in self.train}
        categories = {pair.context: pair.category for pair in reversed(self.judged)}  # of several the first
        found: dict[str, list[int]] = {"seen": [], "unseen": []}
        for number, context in enumerate(contexts):
            found["seen" if categories[context] in trained else "unseen"].append(number)
        return found if all(found.values()) else {}


def load_tables(source: str, data_format: str) -> TableData:
    """Reads a folder in the layout of the original challenge, or a hub data set with its columns.

    Args:
        source: a folder: E2E with train.txt, valid.txt and test.txt, `context||text` on each line; WebNLG 2017 with
            train.json, dev.json, test.json; DART with dart-v1.1.1-full-{train,dev,test}.json or {train,dev,test}.json.
            Or a hub name, its configuration after a colon.
        data_format: "e2e", "webnlg" or "dart".

    Contexts are written as the reference project writes them: `subject : property : object | ...`, DART's properties
    in lower case. Of WebNLG's texts those marked "good" are kept, with the category of their entry.

    Raises:
        FileNotFoundError: a folder without the training or dev file.
        ValueError: another format; a file or row that is not of it, named with its place, or an empty file; the hub
            refuses.
    """
    if data_format not in FORMATS:
        raise ValueError(f"data_format: got {data_format!r}, expected one of {', '.join(FORMATS)}")
    folder = Path(source)
    if not folder.is_dir():
        return _from_hub(source, data_format)
    splits: dict[str, Any] = {}
    for split, names in _FILES[data_format].items():
        path = next((folder / n for n in names if (folder / n).is_file()), None)
        if path is None and split != "test":
            raise FileNotFoundError(f"{folder}: no {' or '.join(names)}, expected the {split} part of {data_format}")
        splits[split] = None if path is None else _READERS[data_format](path)
        if splits[split] == []:
            raise ValueError(f"{path}: got no texts, expected some in the {split} part of {data_format}")
    return TableData(source, **splits)


def find_tables(source: str) -> tuple[TextSplit, TextSplit, TextSplit | None] | None:
    """Train, dev and test of a folder in one of the layouts of load_tables; None where it is in none of them."""
    folder = Path(source).expanduser()
    if (folder / "train.txt").is_file():
        data_format = "e2e"
    elif (folder / _FILES["dart"]["train"][0]).is_file():
        data_format = "dart"
    elif (folder / "train.json").is_file():
        found = _json_format(folder / "train.json")
        if found is None:
            return None
        data_format = found
    else:
        return None
    data = load_tables(str(folder), data_format)
    return _split(data.train), _split(data.dev), None if data.test is None else _split(data.test)


def rows_as_text(table: Table) -> TextSplit | None:
    """The hub's rows of WebNLG or DART, known by their columns, as contexts and texts; None for any other table."""
    for data_format, columns in _HUB_COLUMNS.items():
        if set(columns) <= set(table.names):
            values = zip(*(table.read(column) for column in columns))
            rows = (dict(zip(columns, row)) for row in values)
            return _split(_pairs(f"{table.name}, row", rows, HUB_ROWS[data_format]))
    return None


def references(pairs: Iterable[Pair], limit: int | None = None) -> dict[str, list[str]]:
    """context -> every text about it, or the first `limit`; contexts in order of appearance."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        found.setdefault(pair.context, []).append(pair.text)
    return {context: texts[:limit] for context, texts in found.items()}


def _read_e2e(path: Path) -> list[Pair]:
    pairs = []
    with path.open("rb") as file:
        for number, line in text_lines(file, str(path)):
            if not line.strip():
                continue
            context, bars, text = line.partition("||")
            if not bars:
                raise ValueError(f"{path}, line {number}: got no '||', expected context||text")
            pairs.append(Pair(context.strip(), text.strip()))
    return pairs


def _read_webnlg(path: Path) -> list[Pair]:
    values = _json(path)
    return _pairs(f"{path}, entry", values.get("entries") if isinstance(values, dict) else None, _webnlg_entry)


def _webnlg_entry(entry: dict[str, Any]) -> list[Pair]:
    pairs = []
    for body in entry.values():
        triples = [(t["subject"], t["property"], t["object"]) for t in body["modifiedtripleset"]]
        good = [text["lex"] for text in body["lexicalisations"] if text["comment"] == "good"]
        if not triples:
            raise ValueError("no triples")
        pairs += [Pair(_triples(triples), text, body.get("category")) for text in good]
    return pairs


def _read_dart(path: Path) -> list[Pair]:
    return _pairs(f"{path}, row", _json(path), _dart_row)


def _pairs(place: str, rows: Any, read: Callable[[dict[str, Any]], list[Pair]]) -> list[Pair]:
    """Raises ValueError, naming the row, for one that is not in the challenge's layout."""
    if isinstance(rows, (str, dict)) or not isinstance(rows, Iterable):
        name = place.rpartition(", ")[0]
        raise ValueError(f"{name}: got {type(rows).__name__}, expected a list of the challenge's rows")
    pairs = []
    for number, row in enumerate(rows, start=1):
        try:
            pairs += read(row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            got = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{place} {number}: got {got}, expected a row in the challenge's layout") from error
    return pairs


def _dart_row(row: dict[str, Any]) -> list[Pair]:
    texts = row["annotations"]
    # The hub's rows keep lists in the columns where the file keeps objects in a list.
    texts = texts["text"] if isinstance(texts, dict) else [annotation["text"] for annotation in texts]
    context = _triples((s, p.lower(), o) for s, p, o in row["tripleset"])
    return [Pair(context, text) for text in texts]


def _webnlg_row(row: dict[str, Any]) -> list[Pair]:
    """A hub row: modified_triple_sets.mtriple_set [[\"s | p | o\", ...]], lex.text and lex.comment."""
    triples = [tuple(t.split(" | ", 2)) for t in row["modified_triple_sets"]["mtriple_set"][0]]
    lex = row["lex"]
    good = [text for text, comment in zip(lex["text"], lex["comment"]) if comment == "good"]
    return [Pair(_triples(triples), text, row.get("category")) for text in good]


def _e2e_row(row: dict[str, Any]) -> list[Pair]:
    """A hub row: meaning_representation \"name[X], area[Y]\" and human_reference."""
    slots = _SLOT.findall(row["meaning_representation"])
    context = " | ".join(f"{name.strip()} : {value.strip()}" for name, value in slots)
    return [Pair(context, row["human_reference"])]


def _triples(triples: Iterable[tuple[str, str, str]]) -> str:
    return " | ".join(" : ".join(triple) for triple in triples)


def _split(pairs: list[Pair]) -> TextSplit:
    return TextSplit([pair.context for pair in pairs], None, [pair.text for pair in pairs])


def _json_format(path: Path) -> str | None:
    try:
        values = _json(path)
    except ValueError:  # JSON lines, or damaged: for another reader to say
        return None
    if isinstance(values, dict) and "entries" in values:
        return "webnlg"
    rows = values if isinstance(values, list) else []
    return "dart" if rows and isinstance(rows[0], dict) and "tripleset" in rows[0] else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: got a file that is not JSON ({error})") from error


def _from_hub(source: str, data_format: str) -> TableData:
    loaded = hub_splits(source)
    row = HUB_ROWS[data_format]
    splits: dict[str, Any] = {}
    for split, names in _HUB_SPLITS.items():
        found = next((n for n in names if n in loaded), None)
        if found is None and split != "test":
            raise ValueError(f"data: {source!r} has the splits {sorted(loaded)}, expected one of {names}")
        splits[split] = None if found is None else _pairs(f"{source}, split {found}, row", loaded[found], row)
    return TableData(source, **splits)


_READERS: dict[str, Callable[[Path], list[Pair]]] = {"e2e": _read_e2e, "webnlg": _read_webnlg, "dart": _read_dart}
HUB_ROWS: dict[str, Callable[[dict[str, Any]], list[Pair]]] = {
    "e2e": _e2e_row,
    "webnlg": _webnlg_row,
    "dart": _dart_row,
}
