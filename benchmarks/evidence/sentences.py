"""A small task written out of E2E's texts: is a sentence whole, as CoLA asks."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from .data import read_pairs, write_table

PARTS = {"train": "valid.txt", "dev": "test.txt"}
HELD_BACK = 300
LENGTHS = (6, 18)  # words of a sentence
FORMS = {"is": "are", "are": "is", "has": "have", "have": "has", "a": "an", "an": "a", "serves": "serve",
         "offers": "offer", "located": "locate", "rated": "rate", "called": "call", "was": "were"}  # fmt: skip
SMALL = {"is", "the", "a", "an", "of", "in", "to", "and", "with", "by", "at", "has", "it", "as", "for", "on", "was",
         "are", "be", "that", "from"}  # fmt: skip


def write_acceptable(folder: Path, out: Path) -> None:
    """train.tsv and dev.tsv of `sentence, label`: 1 as somebody wrote it, 0 with one fault. Half and half, drawn.

    The fault: two neighbouring words change places, one of SMALL is left out, or one of FORMS stands in the other
    form. Each text once. valid.txt makes train.tsv, test.txt, whose places are others, dev.tsv.
    """
    for name, file in PARTS.items():
        generator = random.Random(0)
        texts = sorted({text for _, text in read_pairs(folder / "e2e" / file) if _fits(text)})
        generator.shuffle(texts)
        lines = ["sentence\tlabel"]
        for text in texts:
            whole = generator.random() < 0.5
            lines.append(f"{text if whole else ' '.join(_faulty(text.split(), generator))}\t{int(whole)}")
        write_table(out / f"{name}.tsv", lines)


def _fits(text: str) -> bool:
    words = text.split()
    return LENGTHS[0] <= len(words) <= LENGTHS[1] and bool(_neighbours(words))


def _faulty(words: list[str], generator: random.Random) -> list[str]:
    """`words` with one fault of a drawn kind; in an order of its own where no word has the fault drawn."""
    kind = generator.choice(("form", "missing", "order"))
    at = [i for i, word in enumerate(words) if word.lower() in {"form": FORMS, "missing": SMALL}.get(kind, ())]
    if not at:
        i = generator.choice(_neighbours(words))
        return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]
    i = generator.choice(at)
    return [*words[:i], *([FORMS[words[i].lower()]] if kind == "form" else []), *words[i + 1 :]]


def _neighbours(words: list[str]) -> list[int]:
    """Where a word and the next one differ, and are words."""
    pairs = enumerate(itertools.pairwise(words))
    return [i for i, (a, b) in pairs if a.isalpha() and b.isalpha() and a.lower() != b.lower()]


def write_acceptable_held_back(folder: Path, out: Path) -> None:
    """The same with the last HELD_BACK rows of its train.tsv as dev.tsv: what settings are searched on."""
    write_acceptable(folder, out)
    head, *rows = (out / "train.tsv").read_text(encoding="utf-8").splitlines()
    write_table(out / "train.tsv", [head, *rows[:-HELD_BACK]])
    write_table(out / "dev.tsv", [head, *rows[-HELD_BACK:]])
