"""Data of docs/evidence made from other data: a part of training held back, its first rows, questions about texts."""

from __future__ import annotations

import random
from pathlib import Path

HELD_BACK = 872  # as many as SST-2's dev part
FIRST = 1000


def hold_back(folder: Path, out: Path) -> None:
    """sst2/train.tsv without its last 872 rows as train.tsv, and these as dev.tsv: what settings are searched on."""
    head, *rows = (folder / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    write_table(out / "train.tsv", [head, *rows[:-HELD_BACK]])
    write_table(out / "dev.tsv", [head, *rows[-HELD_BACK:]])


def first_rows(folder: Path, out: Path) -> None:
    """The first 1,000 rows of sst2/train.tsv as train.tsv, with sst2/dev.tsv: what --train-rows once took of them."""
    head, *rows = (folder / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    write_table(out / "train.tsv", [head, *rows[:FIRST]])
    write_table(out / "dev.tsv", (folder / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines())


# A question about a text: the slot that answers it, what means yes, what means no.
QUESTIONS = {
    "Is it for families ?": ("family friendly", ("yes",), ("no",)),
    "Is it by the river ?": ("area", ("riverside",), ("city centre",)),
    "Is it cheap ?": ("price", ("cheap", "less than £ 20"), ("high", "more than £ 30")),
    "Do guests like it ?": ("customer rating", ("high", "5 out of 5"), ("low", "1 out of 5")),
}
LONGEST = 20  # words of a text


def write_questions(folder: Path, out: Path) -> None:
    """A pair task of four domains out of E2E: a question about a text, yes (1) or no (0).

    Texts of at most LONGEST words; of each question as many with yes as with no, drawn; valid.txt makes train.tsv,
    test.txt dev.tsv.
    """
    for name, file in (("train", "valid.txt"), ("dev", "test.txt")):
        generator, pairs = random.Random(0), read_pairs(folder / "e2e" / file)
        lines = ["question\ttext\tlabel"]
        for question, (slot, *answers) in QUESTIONS.items():
            some = {text: slots.get(slot) for slots, text in pairs if len(text.split()) <= LONGEST}
            kinds = [[text for text, value in some.items() if value in known] for known in answers]
            for label, texts in zip((1, 0), kinds, strict=True):
                drawn = generator.sample(texts, min(map(len, kinds)))
                lines += [f"{question}\t{text}\t{label}" for text in drawn]
        write_table(out / f"{name}.tsv", lines)


def read_pairs(path: Path) -> list[tuple[dict[str, str], str]]:
    """(slots, text) of every line of a file of `name : X | area : Y||text`."""
    found = []
    for line in filter(None, path.read_text(encoding="utf-8").splitlines()):
        meaning, _, text = line.partition("||")
        pairs = [slot.split(" : ", 1) for slot in meaning.strip().split(" | ")]
        found.append(({slot.strip(): value.strip() for slot, value in pairs}, " ".join(text.split())))
    return found


def write_table(path: Path, lines: list[str]) -> None:
    """Writes the lines of a TSV file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
