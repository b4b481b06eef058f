"""Plans of direct calls on Triton kernels: the launches that a backend's own function does, recorded once.

Triton's JIT looks at every argument of a launch to find the kernel that was compiled for its like, which costs more
than all the rest of a call. Calls of equal keys launch the same compiled kernels with the same constants; only the
addresses differ, and those of all tensors are multiples of 16, or equally far from one. A plan knows a launch's tensors
by their memory, so that it may take parts of what it was given, and is made on tensors that share none.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch

from .. import _triton_utils
from .._environment import tf32, triton_table
from .._triton_utils import Ready, Recording, current_stream, ready
from ._direct import PLAIN, Kept, traits

_UNKNOWN: Any = object()


class Planned:
    """Direct calls of run(*tensors, *options), a backend's function of `count` tensors or Nones and hashable options.

    run launches kernels by `launch` on its tensors and on `memory` alone, and does nothing else to a tensor's values;
    what it returns is memory, one tensor or more. Whether that holds is looked at when a call is planned, so a run
    that needs more for some arguments leaves those calls unplanned. anywhere: of tensors with any strides at any
    address, by plans of their own; else of contiguous ones at multiples of 16 alone, which are quicker to look up.
    """

    def __init__(self, run: Callable[..., Sequence[torch.Tensor]], count: int, anywhere: bool = False):
        self._run, self._count, self._anywhere = run, count, anywhere
        self._plans: Kept[Plan | None] = Kept()

    def find(self, *arguments: Any) -> Plan | None:
        """The plan of a call with these arguments, if one was made."""
        return self._plans.get(self._key(arguments))

    def make(self, *arguments: Any) -> Plan | None:
        """The plan of a call whose arguments were checked; None, from now on, where there can be none."""
        key = self._key(arguments)
        # In one step: another thread may empty the table.
        known = self._plans.get(key, _UNKNOWN)
        if known is not _UNKNOWN:
            return known
        tensors = arguments[: self._count]
        given = [t for t in tensors if t is not None]
        fit = not any(t.is_neg() or not (self._anywhere or t.is_contiguous()) for t in given)
        if not (_triton_utils.LAUNCHER_IS_KNOWN and fit):
            return self._plans.keep(key, None)
        if not self._anywhere and any(t.data_ptr() % 16 for t in given):
            return None
        apart = _apart(tensors)
        with Recording() as recording:
            results = self._run(*apart, *arguments[self._count :])
        return self._plans.keep(key, _plan(recording, apart, tuple(results), self._anywhere))

    def __call__(self, *arguments: Any) -> tuple[torch.Tensor, ...] | None:
        """run's result by a plan, new or old; None where there is none, or where it does not fit the addresses."""
        if not PLAIN.issuperset(map(type, arguments[: self._count])):
            return None
        plan = self._plans.get(self._key(arguments)) or self.make(*arguments)
        return None if plan is None else plan(*arguments[: self._count])

    def _key(self, arguments: tuple[Any, ...]) -> Any:
        """Everything that decides which kernels run, with which constants."""
        tensors, options = arguments[: self._count], arguments[self._count :]
        precision = tensors[0].dtype is torch.float32 and tf32()
        return options, triton_table(), precision, *map(_whereabouts if self._anywhere else traits, tensors)


def _whereabouts(t: torch.Tensor | None) -> object:
    return t if t is None else (t.shape, t.dtype, t.device, t.stride(), t.data_ptr() % 16, t.is_neg())


class Plan:
    """plan(*tensors): the recorded launches on these tensors and on new memory, which it returns as `run` does."""

    __slots__ = (
        *("_anywhere", "_constants", "_device", "_launches", "_offsets", "_parts", "_results", "_scratch", "_slots"),
        *("_first", "kept"),
    )

    def __init__(
        self,
        device: int,
        results: list[tuple[int, tuple[int, ...], torch.dtype]],
        scratch: int,
        offsets: list[int],
        parts: list[tuple[int, int]],
        first: int,
        constants: list[int | float],
        launches: list[tuple[Ready, list[int]]],
        anywhere: bool,
    ):
        """results: number of a tensor of the same shape and dtype or -1, shape, dtype. scratch: elements of the first
        tensor's dtype, `offsets` into them in bytes. parts: (number of a tensor or result, bytes into it). first:
        how many values stand before the constants. launches: with the numbers of the values that each takes.
        """
        self._device, self._results, self._scratch, self._offsets = device, results, scratch, offsets
        self._parts, self._first, self._constants, self._anywhere = parts, first, constants, anywhere
        self._launches = [(launch, itemgetter(*slots)) for launch, slots in launches]
        self._slots = [slots for _, slots in launches]
        # Whether the nodes in C++ were offered it (ops/_node.py).
        self.kept = False

    def __call__(self, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...] | None:
        stream = current_stream(self._device)
        like = tensors[0]
        if stream is None or like is None:
            return None
        results = [
            # The quicker call, where there is a tensor to take after.
            like.new_empty(shape, dtype=dtype) if n < 0 else torch.empty_like(tensors[n])  # type: ignore[arg-type]
            for n, shape, dtype in self._results
        ]
        values: list[Any] = [0 if t is None else t.data_ptr() for t in tensors]
        values += [t.data_ptr() for t in results]
        if self._offsets:
            # Held to the end: else another thread might be given it between two launches.
            scratch = like.new_empty(self._scratch)
            start = scratch.data_ptr()
            values += [start + offset for offset in self._offsets]
        union = 0
        for address in values[len(tensors) :] if self._anywhere else values:
            union |= address
        if union & 15:
            return None
        if self._parts:
            values += [values[n] + offset for n, offset in self._parts]
        values += self._constants
        for launch, arguments in self._launches:
            launch(stream, *arguments(values))
        return tuple(results)

    def described(self) -> tuple[Any, ...] | None:
        """The same in numbers, for csrc/autograd/plans.cpp; None where it launches what only Triton's launcher does.

        (device, [(shape, dtype) of each result], scratch, offsets, parts, constants, launches), of a launch (function,
        grid, threads, shared memory, numbers of values). A constant is its bits, as the kernel takes it.
        """
        constants: list[int] = []
        launches = []
        for (launch, _), slots in zip(self._launches, self._slots, strict=True):
            described = launch.described()
            if described is None or self._anywhere:
                return None
            *config, kinds = described
            taken = []
            for slot, kind in zip(slots, kinds, strict=False):  # what follows are compile-time constants
                if kind == "constexpr":
                    continue
                if kind.startswith("*"):
                    if slot >= self._first:
                        return None
                    taken.append(slot)
                elif kind in _FORMATS and slot >= self._first:
                    value = self._constants[slot - self._first]
                    taken.append(self._first + len(constants))
                    try:
                        constants.append(int.from_bytes(struct.pack(f"<{_FORMATS[kind]}", value), "little"))
                    except OverflowError:  # a number beyond float32
                        return None
                else:
                    return None
            if set(kinds[len(slots) :]) - {"constexpr"}:
                return None
            launches.append((*config, tuple(taken)))
        results = [(shape, dtype) for _, shape, dtype in self._results]
        return self._device, results, self._scratch, self._offsets, self._parts, constants, launches


# Of a scalar that a kernel takes, for struct.
_FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}


def _apart(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The tensors, but new memory in the place of one that shares an earlier one's: only addresses tell them apart."""
    apart: list[torch.Tensor | None] = []
    for t in tensors:
        shared = t is not None and any(_overlap(t, other) for other in apart)
        apart.append(_another(t) if shared and t is not None else t)
    return apart


def _another(t: torch.Tensor) -> torch.Tensor:
    """New memory with t's shape and strides, equally far from a multiple of 16."""
    skipped = t.data_ptr() % 16 // t.element_size()
    memory = t.new_empty(skipped + (_end(t) - t.data_ptr()) // t.element_size())
    return memory.as_strided(t.shape, t.stride(), skipped)


def _overlap(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and max(one.data_ptr(), other.data_ptr()) < min(_end(one), _end(other))


def _end(t: torch.Tensor) -> int:
    last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr() + (last + 1) * t.element_size() if t.numel() else t.data_ptr()


def _place(value: torch.Tensor, known: Sequence[torch.Tensor | None]) -> tuple[int, int] | None:
    """(number, bytes into it) of the known tensor in whose memory `value` begins; None where there is none."""
    start = value.data_ptr()
    for n, t in enumerate(known):
        if t is value:
            return n, 0
        if t is not None and t.data_ptr() <= start < _end(t):
            return n, start - t.data_ptr()
    return None


def _plan(
    recording: Recording, tensors: Sequence[torch.Tensor | None], results: tuple[torch.Tensor, ...], anywhere: bool
) -> Plan | None:
    """None where a launch takes anything but the tensors and memory, or a kernel cannot be launched without the JIT."""
    made = recording.made
    if not recording.launches or not all(any(_same(r, m) for m in made) for r in results):
        return None
    scratch = [m for m in made if not any(_same(r, m) for r in results)]
    known = [*tensors, *results, *scratch]
    offsets, size = [], 0
    for t in scratch:
        offsets.append(size)
        size += -(-t.numel() * t.element_size() // 16) * 16
    parts = _parts(recording, known)
    if parts is None:
        return None
    first = len(known) + len(parts)
    constants: list[int | float] = [0]
    launches = []
    for kernel, grid, device, args, meta in recording.launches:
        slots = []
        for value in args:
            if isinstance(value, torch.Tensor):
                place = _place(value, known)
                assert place is not None
                slots.append(place[0] if place[1] == 0 else len(known) + parts.index(place))
            elif value is None:
                slots.append(first)
            else:
                slots.append(first + len(constants))
                constants.append(value)
        found = ready(kernel, grid, device, *args, **meta)
        if found is None:
            return None
        launches.append((found, slots))
    like = tensors[0]
    assert like is not None
    return Plan(
        like.device.index or 0,
        [(_alike(r, tensors), tuple(r.shape), r.dtype) for r in results],
        -(-size // like.element_size()),
        offsets,
        parts,
        first,
        constants,
        launches,
        anywhere,
    )


def _same(result: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether a result is this memory, in whatever shape."""
    return result is made or (
        result.data_ptr() == made.data_ptr() != 0
        and (result.numel(), result.dtype) == (made.numel(), made.dtype)
        and result.is_contiguous()
    )


def _parts(recording: Recording, known: Sequence[torch.Tensor | None]) -> list[tuple[int, int]] | None:
    """Places behind the start of a known tensor that launches take; None where one takes unknown memory."""
    parts: list[tuple[int, int]] = []
    for *_, args, _ in recording.launches:
        for value in args:
            if isinstance(value, torch.Tensor):
                place = _place(value, known)
                if place is None:
                    return None
                if place[1] and place not in parts:
                    parts.append(place)
    return parts


def _alike(result: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> int:
    """The number of a contiguous tensor of its shape and dtype, -1 where there is none."""
    for n, t in enumerate(tensors):
        if t is not None and (t.shape, t.dtype) == (result.shape, result.dtype) and t.is_contiguous():
            return n
    return -1
