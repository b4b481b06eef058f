"""Which columns hold the texts and the labels, by their names, where nobody says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ._table import listed
from .text import Columns

# GLUE's own names and the commonest ones outside it. Upper and lower case are the same.
TEXT_PAIRS = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("question1", "question2"), ("question", "sentence"),
    ("premise", "hypothesis"), ("text1", "text2"), ("text_1", "text_2"), ("text_a", "text_b"),
    ("sentence_a", "sentence_b"), ("query", "passage"), ("query", "document"), ("#1 string", "#2 string"),
)  # fmt: skip
# The first name that is there counts in each of these; several of the same rank are a question to the user.
TEXTS = (
    ("sentence", "text"),
    (
        "review", "content", "body", "comment", "message", "tweet", "utterance", "document", "review_text",
        "review_body", "review_content", "comment_text", "headline", "question", "description",
    ),
)  # fmt: skip
LABELS = (
    ("label",),
    ("labels", "gold_label", "is_duplicate", "quality"),
    ("stars", "star", "rating", "target", "class", "category", "sentiment", "score", "emotion", "intent", "topic"),
)  # fmt: skip
# (what is read, what is to be written)
WRITTEN = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "response"), ("instruction", "output"),
    ("input", "output"), ("input", "target"), ("source", "target"), ("context", "target"), ("context", "response"),
    ("context", "text"), ("question", "answer"), ("document", "summary"), ("article", "summary"), ("text", "summary"),
    ("article", "highlights"), ("dialogue", "summary"), ("text", "target"),
    ("meaning_representation", "human_reference"),
)  # fmt: skip


def choose_columns(
    name: str, names: Sequence[str], kind: str, text: str | None, pair: str | None, label: str | None
) -> tuple[Columns, list[str]]:
    """(columns, notes): those that were given, the others by name.

    Raises ValueError where none fits, where several fit equally well, where a given one is not there, or one is given
    twice; the message has the columns there are and the option.
    """
    given = {"text_column": text, "text_pair_column": pair, "label_column": label}
    _check_there(name, names, given)
    chosen = [column for column in given.values() if column is not None]
    twice = next((column for column in chosen if chosen.count(column) > 1), None)
    if twice is not None:
        options = " and ".join(option for option, column in given.items() if column == twice)
        raise ValueError(f"{options}: got {twice!r} for each, expected different columns")
    if pair is not None and (text is None or kind == "generation"):
        expected = "no second text in a generation" if kind == "generation" else "text_column to be given with it"
        raise ValueError(f"text_pair_column: got {pair!r}, expected {expected}")
    if kind == "generation":
        return _written(name, names, text, label)
    notes: list[str] = []
    if label is None:
        label = _by_rank(name, names, (text, pair), LABELS, "label", notes)
    if text is None:
        text, pair = _text(name, names, label, notes)
    return Columns(text, pair, label), notes


def text_columns(name: str, names: Sequence[str], text: str | None, pair: str | None) -> tuple[str, str | None]:
    """(text, pair) of inputs without labels, given or by name as in choose_columns."""
    _check_there(name, names, {"text_column": text, "text_pair_column": pair})
    if text is None and pair is not None:
        raise ValueError(f"text_pair_column: got {pair!r}, expected text_column to be given with it")
    return (text, pair) if text is not None else _text(name, names, None, [])


def _check_there(name: str, names: Sequence[str], given: Mapping[str, str | None]) -> None:
    for option, column in given.items():
        if column is not None and column not in names:
            raise ValueError(f"{option}: got {column!r}, but {name} has the columns {listed(names)}")


def _text(name: str, names: Sequence[str], label: str | None, notes: list[str]) -> tuple[str, str | None]:
    real = {column.casefold(): column for column in names if column != label}
    pairs = [(real[a], real[b]) for a, b in TEXT_PAIRS if a in real and b in real]
    if len(pairs) > 1:
        raise ValueError(
            f"text_column, text_pair_column: {name} has several pairs of texts ({'; '.join(map(listed, pairs))}), "
            "expected to be told which"
        )
    if pairs:
        return pairs[0]
    return _by_rank(name, names, (label,), TEXTS, "text", notes), None


def _written(name: str, names: Sequence[str], text: str | None, label: str | None) -> tuple[Columns, list[str]]:
    real = {column.casefold(): column for column in names}
    pairs = [(real[a], real[b]) for a, b in WRITTEN if a in real and b in real]
    pairs = [(a, b) for a, b in pairs if text in (None, a) and label in (None, b)]
    if text is not None and label is not None:
        pairs = [(text, label)]
    if len(pairs) != 1:
        found = f"more than one pair that fits ({'; '.join(map(listed, pairs))})" if pairs else "none that are known"
        raise ValueError(
            f"text_column, label_column: {name} has the columns {listed(names)}, {found}; expected to be told which is "
            "read and which is to be written: --text_column NAME --label_column NAME"
        )
    return Columns(pairs[0][0], None, pairs[0][1]), []


def _by_rank(
    name: str,
    names: Sequence[str],
    taken: Sequence[str | None],
    ranks: Sequence[Sequence[str]],
    what: str,
    notes: list[str],
) -> str:
    option, left = f"{what}_column", [column for column in names if column not in taken]
    fits = [[column for column in left if column.casefold() in rank] for rank in ranks]
    best = next((found for found in fits if found), [])
    if len(best) != 1:
        found = f"{listed(best)} may each be the {what}" if best else f"none is known as the {what}"
        hint = "" if best else " (the first line must be a header of column names)"
        raise ValueError(f"{option}: {name} has the columns {listed(names)}, {found}: name it by --{option}{hint}")
    others = [column for found in fits for column in found if column not in best]
    if others:
        notes.append(f"The {what} is read from {best[0]!r}; {listed(others)} could be meant too (--{option}).")
    return best[0]
