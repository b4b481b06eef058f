"""Data of docs/evidence that is made from other data: a part of training held back, and pairs that match or do not."""

from __future__ import annotations

import random
from pathlib import Path

HELD_BACK = 872  # as many as SST-2's dev part


def hold_back(folder: Path, out: Path) -> None:
    """sst2/train.tsv without its last 872 rows as train.tsv, and these as dev.tsv: what settings are searched on."""
    head, *rows = (folder / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    _write(out / "train.tsv", [head, *rows[:-HELD_BACK]])
    _write(out / "dev.tsv", [head, *rows[-HELD_BACK:]])


def write_pairs(folder: Path, out: Path) -> None:
    """A pair task out of E2E: is the text about this meaning, or has one of the meaning's values been changed?

    One text for each meaning, first as it is (label 1), then with one value replaced by another that this slot has
    elsewhere (label 0). Meanings of valid.txt are train.tsv, those of test.txt dev.tsv.
    """
    for name, file in (("train", "valid.txt"), ("dev", "test.txt")):
        generator, meanings = random.Random(0), _meanings(folder / "e2e" / file)
        values: dict[str, list[str]] = {}
        for slots, _ in meanings:
            for slot, value in slots.items():
                if value not in values.setdefault(slot, []):
                    values[slot].append(value)
        lines = ["meaning\ttext\tlabel"]
        for slots, text in meanings:
            lines.append(f"{_words(slots)}\t{text}\t1")
            several = [s for s in slots if len(values[s]) > 1]
            if not several:
                continue
            slot = generator.choice(several)
            other = generator.choice([v for v in values[slot] if v != slots[slot]])
            lines.append(f"{_words({**slots, slot: other})}\t{text}\t0")
        _write(out / f"{name}.tsv", lines)


def _meanings(path: Path) -> list[tuple[dict[str, str], str]]:
    """(slots, its first text) of every meaning of a file of `name : X | area : Y||text` lines."""
    found: dict[str, str] = {}
    for line in filter(None, path.read_text(encoding="utf-8").splitlines()):
        meaning, _, text = line.partition("||")
        found.setdefault(meaning.strip(), " ".join(text.split()))
    pairs = [(dict(slot.split(" : ", 1) for slot in meaning.split(" | ")), text) for meaning, text in found.items()]
    return [({slot.strip(): value.strip() for slot, value in slots.items()}, text) for slots, text in pairs]


def _words(slots: dict[str, str]) -> str:
    return ", ".join(f"{slot}: {value}" for slot, value in slots.items())


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
