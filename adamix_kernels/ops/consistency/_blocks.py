"""Row pairs a few at a time: what a pair needs between its logits and its loss stays in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

# Logits of one pass in a block. On a CPU a thread's part of it and of the five tensors beside it stay in the caches, no
# page is touched for the first time, and calls are few; a GPU wants few launches and bounded memory.
_CPU, _GPU = 2**17, 2**26

At = tuple[slice, ...]
# In front of a block's slices: whatever dimensions come before the rows.
_LEADING = (...,)


def by_blocks(work: Callable[[At], None], logits: torch.Tensor) -> None:
    """work(slices of the row dimensions) for every block of one pass's logits; what a call makes is gone before the
    next. Bits do not depend on the blocks.
    """
    for at in blocks(logits.shape[:-1], pairs_at_once(logits.shape[-1], logits.device)):
        work(at)


def rows_by_blocks(work: Callable[[At], Sequence[torch.Tensor]], logits: torch.Tensor) -> Sequence[torch.Tensor]:
    """The same for a work that returns tensors [..., *rows]: those of all rows."""
    rows = logits.shape[:-1]
    pairs = pairs_at_once(logits.shape[-1], logits.device)
    if rows.numel() <= pairs:
        return work(())
    made: list[torch.Tensor] = []
    for at in blocks(rows, pairs):
        parts = work(at)
        made = made or [part.new_empty((*part.shape[: -len(rows)], *rows)) for part in parts]
        for whole, part in zip(made, parts, strict=True):
            whole[_LEADING + at] = part
    return made


def pairs_at_once(vocab: int, device: torch.device) -> int:
    """The most row pairs in a block, at least one for each thread."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return threads * max(1, (_CPU if device.type == "cpu" else _GPU) // max(vocab, 1))


def blocks(rows: Sequence[int], pairs: int) -> Iterator[At]:
    """Slices of the row dimensions that cover them once, each with at most `pairs` rows; () where that is all."""
    if math.prod(rows) <= pairs:
        yield ()
        return
    inner = math.prod(rows[1:])
    step = max(1, pairs // inner)
    for start in range(0, rows[0], step):
        for rest in blocks(rows[1:], pairs):
            yield slice(start, start + step), *(rest or [slice(None)] * (len(rows) - 1))
