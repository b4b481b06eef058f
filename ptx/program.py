"""A kernel that can be run: its decoded instructions in the executor, and its launches."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import decode_memory  # noqa: F401 (its decoders join the others)
from .build import engine
from .decode import Decoded, decode
from .operands import Operands, Slot
from .text import UnknownPtxError, read

ORDERS = ("forward", "backward", "slices")
_INSTRUCTION, _TEXT, _DISTANCES = 12, 1 << 16, 128


@dataclass(frozen=True)
class How:
    """In which order a launch runs.

    order: of a block's warps: each as far as it comes, the first first ("forward") or the last ("backward"), or random
        slices of a few instructions ("slices"). blocks: the same of the grid, "slices" a random order. late: whether a
        wgmma reads its operands when it is waited for, not when it is issued.
    seed: of what is random. races: whether they are looked for. statistics: whether memory access is counted.
    limit: instructions after which a launch is given up. blocks_at_most, enough: only so many blocks run, and none
        begins after so many instructions; those that run are spread over the grid; 0: all of them. zeros: what shared
        memory begins with, as what other blocks of a cluster would have written there is never written; else NaN that
        nobody set.
    """

    order: str = "forward"
    blocks: str = "forward"
    late: bool = False
    seed: int = 0
    races: bool = True
    statistics: bool = False
    limit: int = 4 * 10**9
    blocks_at_most: int = 0
    enough: int = 0
    zeros: bool = False


@dataclass(frozen=True)
class Span:
    """Global memory from low to high (excluded), an argument's or one that it leads to."""

    low: int
    high: int
    name: str


@dataclass(frozen=True)
class Outcome:
    """reports: what a GPU need not have survived, in words. touched: sectors of every span, read from outside and
    written, [spans, 2]. blocks: how many ran. firsts: sectors that a block read, and wrote, for the first time, summed
    over the blocks, [spans, 2]. distances: of sectors that a block read again, how many others it had touched since;
    bucket k counts those from 2^(k/4) on."""

    reports: list[str]
    instructions: int
    products: int
    barriers: int
    touched: np.ndarray
    blocks: int
    firsts: np.ndarray
    distances: np.ndarray


class Program:
    """The kernel of a PTX text. Raises UnknownPtxError for an instruction that the executor does not know."""

    def __init__(self, text: str):
        self.text = text
        self.lines = text.splitlines()
        self.kernel = read(text)
        self.name = self.kernel.name
        operands = Operands(self.kernel)
        decoded = [decode(self.kernel, statement, operands) for statement in self.kernel.statements]
        self.names = [one.name for one in decoded]
        self._handle = self._load(decoded, operands)

    def _load(self, decoded: Sequence[Decoded], operands: Operands) -> int:
        places, register_bytes = operands.places()

        def placed(slot: Slot) -> tuple[int, int, int]:
            if slot.place is None:
                return -1, 0, 0
            if isinstance(slot.place, int):
                return slot.place, 0, slot.bytes
            return (*places[slot.place], slot.bytes)

        rows = np.zeros((len(decoded), _INSTRUCTION), dtype=np.int64)
        slots = []
        for row, one in zip(rows, decoded, strict=True):
            row[:5] = one.line, one.target, one.negated, len(one.out), len(one.inputs)
            row[5 : 5 + len(one.imm)] = one.imm
            slots += [placed(slot) for slot in (one.guard, *one.out, *one.inputs)]
        table, image, special = np.array(slots, dtype=np.int64), bytes(operands.image), operands.special()
        error = ctypes.create_string_buffer(4096)
        handle = engine().ptx_load(
            len(decoded), ("\n".join(self.names) + "\n").encode(), _pointer(rows), _pointer(table), image,
            ctypes.c_int64(len(image)), ctypes.c_int64(register_bytes), len(places) + 1, self.kernel.own,
            _pointer(special), error, 4096,
        )  # fmt: skip
        if error.value:
            engine().ptx_free(ctypes.c_void_p(handle))
            raise UnknownPtxError(f"{self.name}: unknown instructions: {error.value.decode().strip()}")
        return handle

    def __del__(self):
        if getattr(self, "_handle", None):
            engine().ptx_free(ctypes.c_void_p(self._handle))

    def launch(
        self, grid: Sequence[int], values: Sequence[int | float | bytes], warps: int, shared: int,
        spans: Sequence[Span], how: How,
    ) -> Outcome:  # fmt: skip
        """Runs the grid.

        values: of the kernel's parameters in their order (a pointer is its address, a struct its bytes); of what
            Triton appends, zeros.
        warps: of a block. shared: its bytes of shared memory. spans: the memory that may be touched.
        """
        sizes = [*grid, *[1] * (3 - len(grid))]
        blocks = _blocks(sizes[0] * sizes[1] * sizes[2], how)
        ranges = np.array([(span.low, span.high) for span in spans] or [(0, 0)], dtype=np.uint64)
        options = np.array(
            [
                ORDERS.index(how.order), how.seed, how.statistics, how.races, how.late, how.limit,
                how.enough or 2**62, how.zeros,
            ],
            dtype=np.int64,
        )  # fmt: skip
        out, counts = ctypes.create_string_buffer(_TEXT), np.zeros(5, dtype=np.int64)
        touched = np.zeros((max(1, len(spans)), 2), dtype=np.int64)
        engine().ptx_launch(
            ctypes.c_void_p(self._handle), warps, ctypes.c_int64(shared), (ctypes.c_int * 3)(*sizes), _pointer(blocks),
            ctypes.c_int64(len(blocks)), self._packed(values), _pointer(ranges), len(spans), _pointer(options), out,
            ctypes.c_int64(_TEXT), _pointer(counts), _pointer(touched),
        )  # fmt: skip
        reports = [self._said(row, spans) for row in out.value.decode().splitlines()]
        if len(reports) < counts[3]:
            reports.append(f"{self.name}: {counts[3] - len(reports)} reports more than are told")
        reuse = np.zeros(2 * len(ranges) + _DISTANCES, dtype=np.int64)
        engine().ptx_reuse(ctypes.c_void_p(self._handle), _pointer(reuse))
        firsts = reuse[: 2 * len(spans)].reshape(-1, 2)
        return Outcome(
            reports, *counts[:3].tolist(), touched[: len(spans)], int(counts[4]), firsts, reuse[-_DISTANCES:]
        )

    def statistics(self) -> np.ndarray:
        """Of the last launch, [instructions, 7]: executions, sectors, least sectors, bytes, bank waves, least waves,
        sectors loaded that are not among the 1,024 that the block touched last."""
        out = np.zeros((len(self.names), 7), dtype=np.int64)
        engine().ptx_statistics(ctypes.c_void_p(self._handle), _pointer(out))
        return out

    def _packed(self, values: Sequence[int | float | bytes]) -> bytes:
        packed = bytearray(self.kernel.parameter_bytes + 16)
        places = list(self.kernel.parameters.values())
        if len(values) > len(places):
            raise ValueError(f"values: got {len(values)}, expected at most {len(places)}, {self.name}'s parameters")
        for (at, size), value in zip(places, values, strict=False):
            if isinstance(value, bytes):
                packed[at : at + size] = value[:size]
            elif isinstance(value, float):
                packed[at : at + size] = struct.pack("<f" if size == 4 else "<d", value)
            else:
                packed[at : at + size] = (int(value) & (2 ** (8 * size) - 1)).to_bytes(size, "little")
        return bytes(packed)

    def _said(self, row: str, spans: Sequence[Span]) -> str:
        kind, line, times, first = [*row.split("\t"), "", "", ""][:4]
        number = int(line or 0)
        source = next((s.source for s in self.kernel.statements if s.line == number), "")
        for at, span in enumerate(spans):
            first = first.replace(f"range #{at}", span.name) if first.endswith(f"range #{at}") else first
        text = self.lines[number - 1].strip()[:100] if number else ""
        return f"{self.name}: {kind}, {times} times, PTX line {number} ({source}): {text} | first: {first.strip()}"


def _blocks(count: int, how: How) -> np.ndarray:
    numbers = np.arange(count, dtype=np.int64)
    if 0 < how.blocks_at_most < count or how.enough:
        # Also where all may run: as few of them as are enough would else be the grid's first, one side of a gradient.
        numbers = _spread(count, min(count, how.blocks_at_most or count))
    if how.blocks == "slices":
        return np.random.default_rng(how.seed).permutation(numbers)
    return np.ascontiguousarray(numbers[::-1]) if how.blocks == "backward" else numbers


def _spread(count: int, some: int) -> np.ndarray:
    """So many numbers below count, evenly spread however few of them are taken: steps of the golden ratio."""
    steps = (np.arange(4 * some, dtype=np.float64) * 0.6180339887498949) % 1.0
    _, first = np.unique((steps * count).astype(np.int64), return_index=True)
    return (steps[np.sort(first)][:some] * count).astype(np.int64)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)
