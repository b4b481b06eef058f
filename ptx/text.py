"""Reads PTX: the instructions of a kernel, its registers, labels and parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)", re.S)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,\n]*?(\w+)\s*(?:,|\n|$)")
_STRUCT = re.compile(r"\.param\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]")
_LOCATION = re.compile(r"\.loc.*?//\s*(.*)")
_LABEL = re.compile(r"([$\w]+):\s*(.*)")


class UnknownPtxError(NotImplementedError):
    """PTX that the executor does not know; it is never skipped."""


@dataclass(frozen=True)
class Statement:
    """line: in the PTX, from 1. text: "@%p1 add.s32 %r1, %r2, 3". source: where in Python it comes from."""

    line: int
    text: str
    source: str


@dataclass
class Kernel:
    """parameters: name -> (offset, bytes). registers: name -> kind. labels: name -> the statement after it."""

    name: str
    parameters: dict[str, tuple[int, int]]
    parameter_bytes: int
    statements: list[Statement] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)


def read(text: str) -> Kernel:
    """The kernel of a PTX text that holds one. Raises UnknownPtxError."""
    head = _ENTRY.search(text)
    if head is None or len(_ENTRY.findall(text)) != 1:
        raise UnknownPtxError(f"PTX: got {len(_ENTRY.findall(text))} kernels, expected one")
    if ".func" in text:
        raise UnknownPtxError(f"{head.group(1)}: a function that is called")
    kernel = Kernel(head.group(1), *_parameters(head.group(2)))
    _Body(kernel).read(text.splitlines(), text[: head.end()].count("\n"))
    return kernel


def _parameters(declared: str) -> tuple[dict[str, tuple[int, int]], int]:
    found, at = {}, 0
    for align, name, size in _STRUCT.findall(declared):
        at = -(-at // int(align)) * int(align)
        found[name] = at, int(size)
        at += int(size)
    if found:
        return found, at
    for kind, name in _PARAMETER.findall(declared):
        size = bits(kind) // 8
        at = -(-at // size) * size
        found[name] = at, size
        at += size
    return found, at


def bits(kind: str) -> int:
    """Of a PTX type: 32 of "f32", "b32" and "f16x2", 16 of "bf16"."""
    number = re.search(r"\d+", kind)
    if number is None:
        raise UnknownPtxError(f"type {kind!r}")
    return int(number.group()) * (2 if kind.endswith("x2") else 1)


def split(text: str) -> list[str]:
    """At the commas outside braces and brackets."""
    parts, depth, now = [], 0, ""
    for c in text:
        depth += (c in "{[") - (c in "}]")
        if c == "," and not depth:
            parts.append(now.strip())
            now = ""
        else:
            now += c
    return [*parts, now.strip()] if now.strip() else parts


class _Body:
    """Walks the lines of a kernel. A register declared within braces, as inline assembly does, is known only there."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = [{}]
        self.source = ""

    def read(self, lines: list[str], start: int) -> None:
        for number in range(start, len(lines)):
            raw = lines[number].split("//")[0].strip()
            if raw.startswith((".section", ".file")):
                return
            where = _LOCATION.match(lines[number].strip())
            if where:
                self.source = where.group(1)
            if raw.startswith("{"):
                self.scopes.append({})
                raw = raw[1:]
            closes = re.search(r"(^|;)\s*\}$", raw) is not None
            for part in (raw[:-1] if closes else raw).split(";"):
                for statement in self._statements(part.strip()):
                    self.kernel.statements.append(Statement(number + 1, statement, self.source))
            if closes and len(self.scopes) > 1:
                self.scopes.pop()

    def _statements(self, part: str) -> Iterator[str]:
        label = _LABEL.match(part)
        if label:
            self.kernel.labels[label.group(1)] = len(self.kernel.statements)
            part = label.group(2).strip()
        if part.startswith(".reg"):
            self._declare(part)
        elif part and part != ")" and not part.startswith("."):
            own = {name: other for scope in self.scopes for name, other in scope.items()}
            yield re.sub(r"%?[A-Za-z_]\w*", lambda m: own.get(m.group(), m.group()), part) if own else part

    def _declare(self, part: str) -> None:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", part)
        if found is None:
            raise UnknownPtxError(f"{self.kernel.name}: {part}")
        kind, names = found.groups()
        for name in (name.strip() for name in names.split(",")):
            many = re.match(r"(%?\w+)<(\d+)>", name)
            if many:
                for n in range(int(many.group(2))):
                    self.kernel.registers[f"{many.group(1)}{n}"] = kind
            elif len(self.scopes) > 1:
                self.scopes[-1][name] = f"{name}@{len(self.kernel.registers)}"
                self.kernel.registers[self.scopes[-1][name]] = kind
            else:
                self.kernel.registers[name] = kind
