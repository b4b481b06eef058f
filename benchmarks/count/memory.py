"""Random tensors of any size in the memory of a small one, as what is counted touches little of what it is given; and
which memory a kernel's argument leads to."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ptx.host import extent
from ptx.program import Span

from ..ops.cases import Draw

PERIOD = 1 << 22
_LARGE = 1 << 25
# Linux: the place is given; no memory is set aside before it is written.
_FIXED, _NO_RESERVE = mmap.MAP_PRIVATE | 0x10, 0x4000


class CountDraw(Draw):
    """As Draw on the CPU; the numbers of a large tensor repeat every PERIOD bytes, and take no memory until written."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        super().__init__(torch.device("cpu"), dtype, seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        size = functools.reduce(int.__mul__, shape, self.dtype.itemsize)
        if size < _LARGE:
            return super().normal(*shape, scale=scale)
        pattern = super().normal(PERIOD // self.dtype.itemsize, scale=scale)
        return endless(pattern, size).view(self.dtype)[: size // self.dtype.itemsize].view(shape)


def zeroed(yes: bool) -> None:
    """Whether malloc gives zeros from now on. Blocks that did not run leave their rows unset, and the backward
    with gates would take a NaN there for a sum to make again: counts would differ from run to run."""
    # glibc: M_PERTURB, whose complement is what memory is filled with.
    ctypes.CDLL(None).mallopt(-6, 255 if yes else int(os.environ.get("MALLOC_PERTURB_", "0")))


def endless(pattern: torch.Tensor, size: int) -> torch.Tensor:
    """`size` bytes, as uint8, that repeat the pattern's; pages are private once written. The memory is never freed."""
    count = -(-size // PERIOD)
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype, library.mmap.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long],
    )
    file = os.memfd_create("pattern")
    try:
        os.write(file, pattern.contiguous().view(torch.uint8).numpy().tobytes())
        access = mmap.PROT_READ | mmap.PROT_WRITE
        base = library.mmap(None, count * PERIOD, access, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE, -1, 0)
        for n in range(count):
            if library.mmap(base + n * PERIOD, PERIOD, access, _FIXED, file, 0) in (None, ctypes.c_void_p(-1).value):
                raise MemoryError(f"mmap: errno {ctypes.get_errno()} at {n} of {count} pieces")
    finally:
        os.close(file)
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(base), dtype=torch.uint8)


def spans(argument: bytes, known: Sequence[torch.Tensor]) -> list[Span]:
    """The tensors that the pointers in a kernel's argument lead to: those known, or as much as was allocated there; of
    a pointer into the midst of one, up to the next that is known. None lie over each other."""
    found = [span for t in known for span in extent("known", t)]
    places = _writable()
    words = sorted({int(word) for word in np.frombuffer(argument[: len(argument) // 8 * 8], dtype=np.uint64)})
    starts = sorted({*words, *(span.low for span in found)})
    for word in words:
        region = next(((low, high) for low, high in places if low <= word < high), None)
        if region is None or any(span.low <= word < span.high for span in found):
            continue
        most = region[1] - word
        size = _allocated(word) if word - region[0] >= 16 else 0
        if not 0 < size <= most:
            size = next((start - word for start in starts if start > word), most)
        found.append(Span(word, word + min(size, most), f"0x{word:x}"))
    return found


def _writable() -> list[tuple[int, int]]:
    """Where this process may write, from /proc/self/maps."""
    lines = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) rw", Path("/proc/self/maps").read_text(), re.M)
    joined: list[tuple[int, int]] = []
    for low, high in ((int(low, 16), int(high, 16)) for low, high in lines):
        if joined and joined[-1][1] == low:
            joined[-1] = joined[-1][0], high
        else:
            joined.append((low, high))
    return joined


def _allocated(pointer: int) -> int:
    """Bytes that malloc gave for this pointer, if it is one of its own; glibc keeps them before it, with flags."""
    size = ctypes.c_uint64.from_address(pointer - 8).value & ~7
    return size - 8
