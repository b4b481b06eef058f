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
}
WORDS = ("cold", "loud", "short", "heavy", "warm", "quiet", "long", "light")
FRAMES = ("the {} was {}", "we found the {} {}", "they say this {} is {}", "about the {} : {} , she wrote")
DEGREES = ("", "very ", "quite ", "rather ")
DEV_THINGS = 4
ROWS = {"train": 2400, "dev": 600}


def praises(domain: int, word: int) -> bool:
    """Each domain takes half of the words as praise, each word praises in half of the domains."""
    return (word + 2 * domain) % len(WORDS) < len(WORDS) // 2


def write_dialects(_folder: Path, out: Path) -> None:
    """train.tsv and dev.tsv of `sentence, label`: 1 where the sentence praises. Dev is of things not in training.

    A sentence is a thing of one of the domains, a word and a frame.
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
            said = generator.choice(DEGREES) + WORDS[word]
            sentence = generator.choice(FRAMES).format(generator.choice(some), said)
            found[sentence] = int(praises(domain, word))
        write_table(out / f"{name}.tsv", ["sentence\tlabel", *(f"{text}\t{label}" for text, label in found.items())])
