"""Operands of instructions: registers, constants, addresses; and where the executor keeps them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .text import Kernel, UnknownPtxError, bits, split

_LANES = 32
_SPECIAL = ("%tid.x", "%laneid", *(f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"), "%ntid.x")
# Blocks have one axis.
_FIXED = {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
_INTEGER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?$")


@dataclass(frozen=True)
class Slot:
    """A register by its name, or an offset into the image of constants, or nothing."""

    place: str | int | None
    bytes: int


NOTHING = Slot(None, 0)


class Operands:
    """Reads the operands of one kernel; constants and special registers come into `image`, 32 of each."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.image = bytearray()
        self._constants: dict[tuple[int, int], int] = {}
        self._special = {name: self._put(bytes(4 * _LANES)) for name in _SPECIAL}
        kinds = kernel.registers.items()
        self._bytes = {name: 4 if kind == "pred" else max(2, bits(kind) // 8) for name, kind in kinds}

    def read(self, text: str, size: int = 0) -> Slot:
        """A register (of `size` bytes where that is not 0) or a constant of that size."""
        text = text.strip()
        if text in self._special:
            return Slot(self._special[text], 4)
        if text in _FIXED:
            return self.constant(_FIXED[text], 4)
        if text in self._bytes:
            have = self._bytes[text]
            if size and have != size:
                raise UnknownPtxError(f"{self.kernel.name}: register {text} of {have} bytes where {size} are read")
            return Slot(text, have)
        if text == "_":
            return NOTHING
        if text.startswith(("0f", "0F", "0d", "0D")):
            return self.constant(int(text[2:], 16), 4 if text[1] in "fF" else 8)
        memory = re.match(r"global_smem\s*(?:\+\s*(\d+))?$", text)
        if memory:
            return self.constant(int(memory.group(1) or 0), size or 4)
        if _INTEGER.match(text) and size:
            return self.constant(int(text.rstrip("U"), 0), size)
        raise UnknownPtxError(f"{self.kernel.name}: operand {text!r}")

    def predicate(self, text: str) -> Slot:
        """A predicate, or a constant one for all lanes."""
        return self.constant(-1 if int(text, 0) else 0, 4) if _INTEGER.match(text.strip()) else self.read(text, 4)

    def group(self, text: str, size: int = 0) -> list[Slot]:
        """{a, b, ...}, or one alone."""
        return [self.read(part, size) for part in split(text.strip().strip("{}"))]

    def address(self, text: str) -> tuple[Slot, int]:
        """(register or constant, offset) of [a + b]."""
        inner, offset = text.strip().strip("[]").strip(), 0
        found = re.match(r"(.+?)\s*\+\s*(-?\s*\w+)$", inner)
        if found:
            inner, offset = found.group(1).strip(), int(found.group(2).replace(" ", ""), 0)
        return self.read(inner, 0 if inner in self._bytes else 4), offset

    def holds(self, name: str) -> int:
        """Bytes of a register; 0 for what is none."""
        return self._bytes.get(name.strip(), 0)

    def constant(self, value: int, size: int) -> Slot:
        key = value & (2 ** (8 * size) - 1), size
        if key not in self._constants:
            self._constants[key] = self._put(key[0].to_bytes(size, "little") * _LANES)
        return Slot(self._constants[key], size)

    def _put(self, data: bytes) -> int:
        at = len(self.image)
        self.image += data + bytes(-len(data) % 64)
        return at

    def special(self) -> np.ndarray:
        return np.array(list(self._special.values()), dtype=np.int32)

    def places(self) -> tuple[dict[str, tuple[int, int]], int]:
        """(register -> its offset and its number, the bytes of all): they lie behind the image, when it is complete."""
        found, at = {}, len(self.image)
        for number, (name, size) in enumerate(self._bytes.items(), 1):
            found[name] = at, number
            at += 64 if self.kernel.registers[name] == "pred" else -(-size * _LANES // 64) * 64
        return found, at + 64
