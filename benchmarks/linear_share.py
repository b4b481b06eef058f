"""The share of linear_adamix_loss's time outside its matrix products, counted: `python -m benchmarks.linear_share`.

Nothing is measured here. For a chunk of C row pairs (R = 2 C rows) of V classes from D features, in 2-byte numbers:
    products: 2 (logits, hidden's gradient), or 3 with a trained head, of 2 R V D operations each, at the GPU's rate
    loss: reads R V logits once and writes R V gradients: 4 R V bytes, at LOSS_SHARE of the copy bandwidth
    trained head: hidden's rows into a matrix, 4 R D bytes; the product onto the sum, 2 + 4 + 4 bytes an element of V D
    launches beside the products, at LAUNCH seconds each: PER_CHUNK, and PER_CALL once
`python_tests/ops/test_linear_chunks.py` counts the launches of a call and holds them against these numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from adamix_kernels.ops.consistency import _chunk_size

# Of the copy bandwidth, the goal of the losses alone; a launch whose work is nothing.
LOSS_SHARE, LAUNCH = 0.9, 2.5e-6
# Launches beside the products: the loss; with a trained head also the matrix of rows, and the sum.
PER_CHUNK = {False: 1, True: 3}
PER_CALL = 28
# What linear_adamix_loss took before it had a rule: 64 MiB of float32 logits, six or eight launches a chunk, the
# hidden states and their gradient copied in every chunk.
BEFORE_BYTES, BEFORE_PER_CHUNK = 64 * 2**20, {False: 7, True: 8}


@dataclass(frozen=True)
class Gpu:
    """Copy bandwidth (bytes read and written, a second) and matrix operations a second in 2-byte numbers; memory.

    H200: measured for this project's goals. The others: published peaks at the H200's shares of its own, 0.8.
    """

    name: str
    copy: float
    rate: float
    gib: int


GPUS = (
    Gpu("V100", 0.79e12, 1.0e14, 16),
    Gpu("A100-80", 1.70e12, 2.5e14, 80),
    Gpu("H100", 2.95e12, 7.9e14, 80),
    Gpu("H200", 4.30e12, 7.9e14, 141),
    Gpu("B200", 7.00e12, 1.8e15, 180),
)


@dataclass(frozen=True)
class Share:
    """Seconds of a call: of the products, of the loss, of the passes and launches beside them."""

    pairs: int
    products: float
    loss: float
    rest: float

    @property
    def outside(self) -> float:
        return (self.loss + self.rest) / (self.products + self.loss + self.rest)


def chunk_of(gpu: Gpu, rows: int, vocab: int, width: int, trained: bool) -> int:
    """The rule's row pairs a chunk on that GPU."""
    with mock.patch.object(_chunk_size, "_memory", return_value=gpu.gib * 2**30):
        return _chunk_size.pairs_a_chunk(rows, vocab, width, 2, trained, torch.device("cuda"))


def share(gpu: Gpu, rows: int, vocab: int, width: int, trained: bool, before: bool = False) -> Share:
    """Of `rows` row pairs; before: with the chunks and launches of old."""
    pairs = BEFORE_BYTES // (8 * vocab) // 8 * 8 if before else chunk_of(gpu, rows, vocab, width, trained)
    chunks = -(-rows // pairs)
    products = (3 if trained else 2) * 2 * 2 * rows * vocab * width / gpu.rate
    loss = 4 * 2 * rows * vocab / (LOSS_SHARE * gpu.copy)
    # Read 2 and 4 bytes, write 4; the product's own write of 2 is its own.
    moved = trained * (4 * 2 * rows * width + 10 * vocab * width * chunks)
    if before:
        moved += (8 - 4 * trained) * 2 * rows * width
    launches = chunks * (BEFORE_PER_CHUNK if before else PER_CHUNK)[trained] + PER_CALL
    return Share(pairs, products, loss, moved / gpu.copy + launches * LAUNCH)


def least_width(gpu: Gpu, trained: bool, bound: float = 0.15) -> float:
    """The D from which on the loss alone, at the whole copy bandwidth, takes at most `bound` of the time: its 4 bytes a
    logit against 4 operations a feature, 6 with a trained head. No chunk and no launch changes it, as long as the
    logits go through memory."""
    return 4 / gpu.copy * gpu.rate / (6 if trained else 4) * (1 - bound) / bound


def table(rows: int, vocab: int) -> Iterator[str]:
    yield "| GPU, D | head | pairs a chunk | loss | beside it | outside the products | before | D for 15% by bytes |"
    yield "|---|---|---|---|---|---|---|---|"
    for gpu in GPUS:
        for width in (768, 2048):
            for trained in (False, True):
                now, then = (
                    share(gpu, rows, vocab, width, trained),
                    share(gpu, rows, vocab, width, trained, before=True),
                )
                total = now.products + now.loss + now.rest
                yield (
                    f"| {gpu.name}, {width:,} | {'trained' if trained else 'frozen'} | {now.pairs:,} | "
                    f"{now.loss / total:.1%} | {now.rest / total:.1%} | {now.outside:.1%} | {then.outside:.1%} | "
                    f"{least_width(gpu, trained):,.0f} |"
                )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_share", description=__doc__)
    parser.add_argument("--rows", type=int, default=8192, help="row pairs of a call")
    parser.add_argument("--vocab", type=int, default=50257, help="V")
    options = parser.parse_args(arguments)
    print(*table(options.rows, options.vocab), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
