"""Counts with gates over those of one expert a token at the same size: what they may be, and a table of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ..prefer import shape_class
from .table import Row

# Of instructions, and of the distinct bytes of every launch, where all experts' narrow columns lie in one tile.
INSTRUCTIONS, BYTES = 1.25, 1.05
# Launches more, by the class of shapes: beyond a tile there may be a sort and a sum.
LAUNCHES = {"narrow": 0, "wide": 2}
# Of the bytes of a step, forward and backward together: as a rule, and on a V100 for the reason of _PARTS.
STEP, STEP_V100 = BYTES, 1.15
_PRE = (
    "pre of all 128 columns, 256 bytes a row beside the 4,096 of x and out; made again in the backward it would take "
    "the 2,048 of x; less than 1.05 from 1,280 features on, and with the backward together here too"
)
_PARTS = (
    "of a sample of 22 blocks: each expert's read the rows that named it, and a row that named two may count up to 1.5 "
    "times; for sm_80 60 blocks ran of the same products, and nothing is over"
)
# Of the bytes of gated LoRA alone, for a mixture: its router reads no x of its own.
MIXTURE_BYTES = 1.02
# Of (op and direction, backend, sizes) that cost more: instructions and bytes at most, and why. A V100, whose code is
# another, is named.
MORE = {
    ("gated_adapter/forward", "cuda", "r16 M8 dense"): (INSTRUCTIONS, 1.06, _PRE),
    ("gated_adapter/forward", "cuda", "r16 M8 dense weights"): (INSTRUCTIONS, 1.06, _PRE),
    ("gated_adapter/forward", "cuda", "r16 M8 dense shared"): (INSTRUCTIONS, 1.06, _PRE),
    ("gated_adapter/forward", "triton", "r16 M8 dense"): (INSTRUCTIONS, 1.06, _PRE),
    ("gated_adapter/forward", "triton", "r16 M8 dense weights"): (INSTRUCTIONS, 1.06, _PRE),
    ("gated_adapter/forward", "triton", "r16 M8 dense shared"): (INSTRUCTIONS, 1.06, _PRE),
    ("gated_lora/backward", "cuda sm_70", "r8 M8 top2"): (INSTRUCTIONS, 1.22, _PARTS),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A row with gates, and that of one expert a token."""

    gated: Row
    token: Row

    @property
    def size(self) -> str:
        """The class of its shapes."""
        return shape_class(self.gated.op.partition("/")[0], self.gated.shape)

    @property
    def instructions(self) -> float:
        return self.gated.instructions / self.token.instructions

    @property
    def bytes(self) -> float:
        return self.gated.distinct / self.token.distinct

    @property
    def launches(self) -> int:
        return self.gated.launches - self.token.launches

    @property
    def name(self) -> tuple[str, str, str]:
        """As in MORE."""
        row, sizes = self.gated, self.gated.shape[self.gated.shape.rindex(" r") + 1 :]
        return row.op, row.backend + (" sm_70" if row.target < 80 else ""), sizes

    @property
    def most(self) -> tuple[float, float, str]:
        """Instructions and bytes at most; why, where that is more than as a rule."""
        return MORE.get(self.name, (INSTRUCTIONS, BYTES, ""))

    def over(self) -> list[str]:
        """What is more than it may be, in words."""
        found = []
        instructions, moved, _ = self.most
        if self.size == "narrow" and self.instructions > instructions:
            found.append(f"{self.instructions:.3f} of the instructions, at most {instructions}")
        if self.size == "narrow" and self.bytes > moved:
            found.append(f"{self.bytes:.3f} of the bytes, at most {moved}")
        if self.launches > LAUNCHES[self.size]:
            found.append(f"{self.launches} launches more, at most {LAUNCHES[self.size]}")
        return found


@dataclass(frozen=True)
class Step:
    """The pairs of a size's forward and backward."""

    forward: Pair
    backward: Pair

    def over(self) -> list[str]:
        """What both together cost more than they may, in words."""
        pairs = (self.forward, self.backward)
        gated, token = [pair.gated for pair in pairs], [pair.token for pair in pairs]
        instructions = sum(row.instructions for row in gated) / sum(row.instructions for row in token)
        moved = _bytes(gated) / _bytes(token)
        most = STEP_V100 if self.forward.gated.target < 80 else STEP
        found = [f"{instructions:.3f} of a step's instructions, at most {INSTRUCTIONS}"] * (instructions > INSTRUCTIONS)
        return found + [f"{moved:.3f} of a step's bytes, at most {most}"] * (moved > most)


def _bytes(rows: Iterable[Row]) -> float:
    return sum(row.distinct * row.floor for row in rows)


def steps(rows: Iterable[Row]) -> list[Step]:
    """Of every size whose columns lie in one tile, where both directions have a row beside them."""
    narrow = {pair.gated.key: pair for pair in pairs(rows) if pair.size == "narrow"}
    found = []
    for (op, *size), pair in narrow.items():
        backward = narrow.get((op.replace("/forward", "/backward"), *size))
        if op.endswith("/forward") and backward is not None:
            found.append(Step(pair, backward))
    return found


def by_token(row: Row) -> tuple[str, str, str, str, int]:
    """The key of the row that one with gates is compared with."""
    op, _, direction = row.op.partition("/")
    shape = re.sub(r"\b(dense|top\d+)( weights)?", "token", row.shape)
    name = f"{op.replace('gated', 'routed')}_by_token/{direction}"
    return name, row.backend, shape, row.dtype, row.target


def pairs(rows: Iterable[Row]) -> list[Pair]:
    """Of every row with gates that has one beside it."""
    by_key = {row.key: row for row in rows}
    gated = [row for row in by_key.values() if row.op.startswith("gated_")]
    return [Pair(row, by_key[by_token(row)]) for row in gated if by_token(row) in by_key]


@dataclass(frozen=True)
class Mixture:
    """A router and its LoRAs as one op, and the rows of the two ops."""

    whole: Row
    gated: Row
    router: Row

    @property
    def instructions(self) -> float:
        """Over those of both ops."""
        return self.whole.instructions / (self.gated.instructions + self.router.instructions)

    @property
    def bytes(self) -> float:
        """Over those of gated LoRA."""
        return _bytes([self.whole]) / _bytes([self.gated])

    def over(self) -> list[str]:
        """What is more than it may be, in words."""
        found = []
        if self.instructions >= 1:
            found.append(f"{self.instructions:.3f} of the instructions of both, expected fewer")
        if self.bytes > MIXTURE_BYTES:
            found.append(f"{self.bytes:.3f} of gated LoRA's bytes, at most {MIXTURE_BYTES}")
        if self.whole.launches > self.gated.launches:
            found.append(f"{self.whole.launches} launches, at most gated LoRA's {self.gated.launches}")
        return found


def mixtures(rows: Iterable[Row]) -> list[Mixture]:
    """Of every row of a mixture that has those of its parts beside it."""
    by_key, found = {row.key: row for row in rows}, []
    for (op, backend, shape, *kind), row in by_key.items():
        if not op.startswith("mixture_lora/"):
            continue
        lead, experts = shape.partition(" to ")[0], shape[shape.index(" M") :]
        gated = by_key.get((op.replace("mixture", "gated"), backend, shape, *kind))
        router = by_key.get((op.replace("mixture_lora", "router"), backend, lead + experts, *kind))
        if gated is not None and router is not None:
            found.append(Mixture(row, gated, router))
    return found


def problems(rows: Collection[Row], changed: Collection[tuple]) -> list[str]:
    """What costs more than it may beside one expert a token, or has nothing beside it: of the rows whose keys are among
    `changed`, and those compared with them."""
    have = pairs(rows)
    touched = (pair for pair in have if {pair.gated.key, pair.token.key} & set(changed))
    found = [f"{pair.gated}, over one expert a token: {', '.join(over)}" for pair in touched if (over := pair.over())]
    for mixture in mixtures(rows):
        keys = {row.key for row in (mixture.whole, mixture.gated, mixture.router)}
        if keys & set(changed) and (over := mixture.over()):
            found.append(f"{mixture.whole}, over its parts: {', '.join(over)}")
    for step in steps(rows):
        keys = {row.key for pair in (step.forward, step.backward) for row in (pair.gated, pair.token)}
        if keys & set(changed) and (over := step.over()):
            found.append(f"{step.forward.gated} and backward, over one expert a token: {', '.join(over)}")
    beside = {pair.gated.key for pair in have} | {mixture.whole.key for mixture in mixtures(rows)}
    alone = {row.key: row for row in rows if row.key in changed and row.key not in beside}
    for row in alone.values():
        if row.op.startswith("gated_"):
            found.append(f"{row}: no count of one expert a token to compare with")
        if row.op.startswith("mixture_"):
            found.append(f"{row}: no counts of gated LoRA and of the router to compare with")
    return found


def exceptions(rows: Sequence[Row]) -> list[str]:
    """A line for each of MORE that has a pair: what it may cost, and why."""
    counted, lines = {pair.name for pair in pairs(rows)}, []
    for name, (instructions, moved, why) in MORE.items():
        most = [f"{instructions} of the instructions"] if instructions > INSTRUCTIONS else []
        most += [f"{moved} of the bytes"] if moved > BYTES else []
        if name in counted:
            lines.append(f"{' '.join(name)}: at most {', '.join(most)}: {why}")
    return lines


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table, a line for a pair."""
    lines = ["| op, size | backend | sm | instructions | bytes | device | launches |", "|---|---|---|---|---|---|---|"]
    for pair in pairs(rows):
        row = pair.gated
        lines.append(
            f"| {row.op}, {row.shape}, {row.dtype} | {row.backend} | {row.target} | {pair.instructions:.2f} | "
            f"{pair.bytes:.3f} | {row.device / pair.token.device:.3f} | {row.launches} ({pair.launches:+d}) |"
        )
    return lines


def mixture_table(rows: Sequence[Row]) -> list[str]:
    """The same of mixtures, none where nothing is counted."""
    lines = [
        "| op, size | backend | sm | instructions over both | over gated LoRA's | bytes over gated LoRA's | launches |",
        "|---|---|---|---|---|---|---|",
    ]
    found = mixtures(rows)
    for one in found:
        row, alone = one.whole, one.whole.instructions / one.gated.instructions
        lines.append(
            f"| {row.op}, {row.shape}, {row.dtype} | {row.backend} | {row.target} | {one.instructions:.2f} | "
            f"{alone:.2f} | {one.bytes:.3f} | {row.launches} |"
        )
    return lines if found else []
