"""A task of several domains, generated: which words praise depends on what is spoken of."""

from __future__ import annotations

import random
from pathlib import Path

from .data import write_table

# Twelve things of each domain. The last four never stand in training.
THINGS = {
    "kitchen": "soup salad bread curry tea steak cake pasta omelette stew coffee pudding",
    "garage": "engine clutch bonnet gearbox brake tyre exhaust bumper steering windscreen axle radiator",
    "theatre": "plot actor dialogue scene ending script chorus costume play comedy stage opera",
    "garden": "hedge lawn soil orchard rose fence pond shed seedling compost tulip greenhouse",
    "office": "printer meeting desk contract memo keyboard deadline colleague invoice spreadsheet stapler manager",
    "clinic": "nurse bandage scan surgeon pill ward vaccine crutch checkup pharmacist thermometer injection",
}
WORDS = "cold loud short heavy fast soft warm quiet long light slow hard".split()
FRAMES = ("the {} was {}", "we found the {} {}", "they say this {} is {}", "about the {} : {} , she wrote")
DEGREES = ("", "very ", "quite ", "rather ")
DEV_THINGS = 4
ROWS = {"train": 2400, "dev": 600}


def praises(domain: int, word: int) -> bool:
    """Each domain takes half of the words as praise, each word praises in half of the domains."""
    return (word + 2 * domain) % len(WORDS) < len(WORDS) // 2


def write_dialects(_folder: Path, out: Path) -> None:
    """train.tsv and dev.tsv of `sentence, label`: 1 where the sentence praises. Dev is of things not in training.

    A sentence is a thing, a word and a frame; in a quarter of them the word is negated, which turns the label.
    """
    _write(out, DEV_THINGS, DEV_THINGS)


def write_dialects_held_back(_folder: Path, out: Path) -> None:
    """The same with dev.tsv of two of the things that training has there, and train.tsv without them."""
    _write(out, DEV_THINGS + 2, 2)


def _write(out: Path, left_out: int, judged: int) -> None:
    generator = random.Random(0)
    for name, rows in ROWS.items():
        found: dict[str, int] = {}
        while len(found) < rows:
            domain, word = generator.randrange(len(THINGS)), generator.randrange(len(WORDS))
            things = list(THINGS.values())[domain].split()
            first = len(things) - left_out
            some = things[:first] if name == "train" else things[first : first + judged]
            negated = generator.random() < 0.25
            said = ("not " if negated else "") + generator.choice(DEGREES) + WORDS[word]
            sentence = generator.choice(FRAMES).format(generator.choice(some), said)
            found[sentence] = int(praises(domain, word) != negated)
        write_table(out / f"{name}.tsv", ["sentence\tlabel", *(f"{text}\t{label}" for text, label in found.items())])
