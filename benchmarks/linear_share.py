"""The share of linear_adamix_loss's time outside its matrix products, counted: `python -m benchmarks.linear_share`.

Nothing is measured here. For a chunk of R rows (two for each row pair) of V classes from D features, in 2-byte numbers,
where S = 2 R V bytes are its logits and H = 2 V D the head:
    products: 2 (logits, hidden's gradient), or 3 with a trained head, of 2 R V D operations each at the GPU's rate, and
        of H + S + 2 R D bytes at its copy bandwidth; where the product adds to the head's gradient, 8 V D for its H
    loss: reads S, writes S in the same place; what L2 does not hold at LOSS_SHARE of the copy bandwidth, all at L2's
    L2 replaces at random, as in count_model.py: of b bytes that came in since, exp(-b / L2) is still there. The loss
        finds logits that are older by 0 to H + S bytes of the product and 0 to S of its own; of what it writes, as
        much stays until it is done as what it still has to read from memory leaves
    trained head: hidden's rows into a matrix, 4 R D bytes; where its product does not add (torch below 2.10 or so),
        a pass of 2 + 4 + 4 bytes an element of V D
    launches beside the products, at LAUNCH seconds each: PER_CHUNK, and PER_CALL once
Work that overlaps is the fourth root of the sum of fourth powers, as in count_model.py.
`python_tests/ops/test_linear_chunks.py` counts the launches of a call and holds them against these numbers.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from adamix_kernels.ops.consistency import _chunk_size

from .count.model import OVERLAP

# Of the copy bandwidth, the goal of the losses alone; a launch whose work is nothing.
LOSS_SHARE, LAUNCH = 0.9, 2.5e-6
# Launches beside the products: the loss; with a trained head also the matrix of rows; a sum beside its product. Of a
# call with labels alone.
PER_CHUNK, SUM = {False: 1, True: 2}, 1
PER_CALL = {False: 12, True: 13}
# What linear_adamix_loss took before it had a rule: 64 MiB of float32 logits, six or eight launches a chunk, the
# hidden states and their gradient copied in every chunk.
BEFORE_BYTES, BEFORE_PER_CHUNK, BEFORE_PER_CALL = 64 * 2**20, {False: 7, True: 8}, 28


@dataclass(frozen=True)
class Gpu:
    """Copy bandwidth (bytes read and written, a second) and matrix operations a second in 2-byte numbers; memory; bytes
    of L2, and a second of it in one direction.

    H200: measured for this project's goals. The others: published peaks at the H200's shares of its own, 0.8. L2: see
    count_model.SOURCES.
    """

    name: str
    copy: float
    rate: float
    gib: int
    l2: float
    l2_rate: float


GPUS = (
    Gpu("V100", 0.79e12, 1.0e14, 16, 6e6, 2.2e12),
    Gpu("A100-80", 1.70e12, 2.5e14, 80, 40e6, 4.0e12),
    Gpu("H100", 2.95e12, 7.9e14, 80, 50e6, 5.5e12),
    Gpu("H200", 4.30e12, 7.9e14, 141, 50e6, 5.5e12),
    Gpu("B200", 7.00e12, 1.8e15, 180, 126e6, 10e12),
)


@dataclass(frozen=True)
class Share:
    """Seconds of a call: of the products, of the loss, of the passes and launches beside them; found: the part of the
    logits that the loss reads from L2."""

    pairs: int
    products: float
    loss: float
    rest: float
    found: float

    @property
    def seconds(self) -> float:
        return self.products + self.loss + self.rest

    @property
    def outside(self) -> float:
        return (self.loss + self.rest) / self.seconds


def chunk_of(gpu: Gpu, rows: int, vocab: int, width: int, trained: bool, inside: bool = True) -> int:
    """The rule's row pairs a chunk on that GPU."""
    with mock.patch.object(_chunk_size, "_memory", return_value=gpu.gib * 2**30):
        return _chunk_size.pairs_a_chunk(rows, vocab, width, 2, trained, torch.device("cuda"), inside)


def share(gpu: Gpu, rows: int, vocab: int, width: int, trained: bool, inside: bool = True) -> Share:
    """Of `rows` row pairs in the rule's chunks. inside: a trained head's product adds to the sum."""
    return with_chunks(gpu, chunk_of(gpu, rows, vocab, width, trained, inside), rows, vocab, width, trained, inside)


def with_chunks(gpu: Gpu, pairs: int, rows: int, vocab: int, width: int, trained: bool, inside: bool = True) -> Share:
    """The same in chunks of `pairs` row pairs."""
    chunks = -(-rows // pairs)
    here = 2 * rows / chunks
    logits, head, states = 2 * here * vocab, 2 * vocab * width, 2 * here * width
    arithmetic, moved = here * head / gpu.rate, (head + logits + states) / gpu.copy
    products = 2 * _overlapped(arithmetic, moved)
    launches, passes = PER_CHUNK[trained], 0.0
    if trained:
        products += _overlapped(arithmetic, moved + (3 * head / gpu.copy if inside else 0))
        launches += not inside
        passes = 2 * states + (0 if inside else 5 * head)
    found = _mean_of_exp((head + logits) / gpu.l2) * _mean_of_exp(logits / gpu.l2)
    stays = _mean_of_exp(logits * (1 - found) / gpu.l2)
    loss = _overlapped(logits * (2 - found - stays) / (LOSS_SHARE * gpu.copy), logits / gpu.l2_rate)
    rest = passes / gpu.copy + launches * LAUNCH
    return Share(pairs, chunks * products, chunks * loss, chunks * rest + PER_CALL[trained] * LAUNCH, found)


def before(gpu: Gpu, rows: int, vocab: int, width: int, trained: bool) -> Share:
    """With the chunks and launches of old."""
    pairs = BEFORE_BYTES // (8 * vocab) // 8 * 8
    made = with_chunks(gpu, pairs, rows, vocab, width, trained, inside=False)
    more = -(-rows // pairs) * (BEFORE_PER_CHUNK[trained] - PER_CHUNK[trained] - SUM * trained) * LAUNCH
    copies = (8 - 4 * trained) * 2 * rows * width / gpu.copy
    more += (BEFORE_PER_CALL - PER_CALL[trained]) * LAUNCH
    return Share(pairs, made.products, made.loss, made.rest + more + copies, made.found)


def best(gpu: Gpu, rows: int, vocab: int, width: int, trained: bool) -> Share:
    """Of all chunks of a multiple of 32 pairs, whatever memory they take, the one that is done first."""
    every = (with_chunks(gpu, pairs, rows, vocab, width, trained) for pairs in range(32, rows + 1, 32))
    return min(every, key=lambda found: found.seconds)


def _overlapped(*seconds: float) -> float:
    return sum(each**OVERLAP for each in seconds) ** (1 / OVERLAP)


def _mean_of_exp(most: float) -> float:
    """The mean of exp(-x) over 0 <= x <= most."""
    return -math.expm1(-most) / most if most else 1.0


def least_width(gpu: Gpu, trained: bool, bound: float = 0.15) -> float:
    """The D from which on the loss alone, at the whole copy bandwidth, takes at most `bound` of the time: its 4 bytes a
    logit against 4 operations a feature, 6 with a trained head. No chunk and no launch changes it, as long as the
    logits go through memory."""
    return 4 / gpu.copy * gpu.rate / (6 if trained else 4) * (1 - bound) / bound


def table(rows: int, vocab: int) -> Iterator[str]:
    yield (
        "| GPU, D | head | pairs a chunk | from L2 | loss | beside it | outside the products | sum beside | before | "
        "best chunk: pairs, time, outside | D for 15% by bytes |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for gpu in GPUS:
        for width in (768, 2048):
            for trained in (False, True):
                given = gpu, rows, vocab, width, trained
                now, most = share(*given), best(*given)
                apart = f"{share(*given, inside=False).outside:.1%}" if trained else ""
                yield (
                    f"| {gpu.name}, {width:,} | {'trained' if trained else 'frozen'} | {now.pairs:,} | "
                    f"{now.found:.0%} | {now.loss / now.seconds:.1%} | {now.rest / now.seconds:.1%} | "
                    f"{now.outside:.1%} | {apart} | "
                    f"{before(*given).outside:.1%} | {most.pairs:,}, {most.seconds / now.seconds:.2f}x, "
                    f"{most.outside:.1%} | {least_width(gpu, trained):,.0f} |"
                )


def parts(rows: int, vocab: int, width: int = 768) -> Iterator[str]:
    """Where the time outside goes, in microseconds of a call, against what 15% allows."""
    yield (
        "| GPU | head | products: arithmetic | their bytes beside it | loss: 4 bytes a logit | what L2 saves | "
        "launches, rows' copy | outside | 15% allows | of that the loss at 90% and no L2 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for gpu in GPUS:
        for trained in (False, True):
            found = share(gpu, rows, vocab, width, trained)
            arithmetic = (6 if trained else 4) * 2 * rows * vocab * width / gpu.rate
            moved = 4 * 2 * rows * vocab / (LOSS_SHARE * gpu.copy)
            allowed = 0.15 / 0.85 * found.products
            micro = (
                arithmetic, found.products - arithmetic, moved, found.loss - moved, found.rest,
                found.loss + found.rest, allowed,
            )  # fmt: skip
            columns = " | ".join(f"{1e6 * seconds:,.0f}" for seconds in micro)
            yield f"| {gpu.name} | {'trained' if trained else 'frozen'} | {columns} | {moved / allowed:.2f}x |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_share", description=__doc__)
    parser.add_argument("--rows", type=int, default=8192, help="row pairs of a call")
    parser.add_argument("--vocab", type=int, default=50257, help="V")
    options = parser.parse_args(arguments)
    print(*table(options.rows, options.vocab), "", *parts(options.rows, options.vocab), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
