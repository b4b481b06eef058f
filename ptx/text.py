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
_FUNCTION = re.compile(r"^[ \t]*(?:\.\w+\s+)*\.func\s+(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\)\s*)?([;{])", re.M)
_FORMAL = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?\s*$")
CALL = re.compile(
    r"(?:@!?\S+\s+)?call(?:\.uni)?\s+(?:\((?P<results>[^)]*)\)\s*,\s*)?(?P<name>[\w$]+)\s*(?:,\s*\((?P<values>[^)]*)\)\s*)?$"
)

# LLVM packs a half beside one that nobody set, and takes the half out again. The executor knows of whole registers
# whether they are set, so it is told to move the half.
_HALF = re.compile(r"(mov\.b32\s+(%r\d+), \{(%rs\d+), %rs\d+\};\s*\n\s*)mov\.b32\s+\{(%rs\d+), _\}, \2;")


class UnknownPtxError(NotImplementedError):
    """PTX that the executor does not know; it is never skipped."""


@dataclass(frozen=True)
class Statement:
    """line: in the PTX, from 1. text: "@%p1 add.s32 %r1, %r2, 3". source: where in Python it comes from."""

    line: int
    text: str
    source: str


@dataclass
class Function:
    """One that is called. results, formals: names of what it gives and takes, with their bytes. first, last: its
    statements, the last one excluded."""

    name: str
    results: list[tuple[str, int]]
    formals: list[tuple[str, int]]
    first: int = 0
    last: int = 0

    @property
    def way_back(self) -> str:
        """The register that holds the statement after the call."""
        return f"way_back@{self.name}"


@dataclass
class Kernel:
    """parameters: name -> (offset, bytes). registers: name -> kind. labels: name -> the statement after it. functions:
    what is called, behind the kernel's own statements. passed: what a call takes and gives, name -> the function's own
    name of it, and its bytes."""

    name: str
    parameters: dict[str, tuple[int, int]]
    parameter_bytes: int
    statements: list[Statement] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    passed: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def own(self) -> int:
        """Statements of the kernel itself, which come first."""
        return min((one.first for one in self.functions.values()), default=len(self.statements))


def read(text: str) -> Kernel:
    """The kernel of a PTX text that holds one. Raises UnknownPtxError."""
    text = _HALF.sub(r"\1mov.b16 \4, \3;", text)
    head = _ENTRY.search(text)
    if head is None or len(_ENTRY.findall(text)) != 1:
        raise UnknownPtxError(f"PTX: got {len(_ENTRY.findall(text))} kernels, expected one")
    kernel, lines = Kernel(head.group(1), *_parameters(head.group(2))), text.splitlines()
    called = [found for found in _FUNCTION.finditer(text) if found[4] == "{"]
    if any(found.start() < head.start() for found in called):
        raise UnknownPtxError(f"{kernel.name}: a function before the kernel")
    for found in called:
        kernel.functions[found[2]] = Function(found[2], _formals(found[1], found[2]), _formals(found[3], found[2]))
    ends = [text.count("\n", 0, found.start()) for found in called] + [len(lines)]
    _Body(kernel).read(lines, text[: head.end()].count("\n"), ends[0])
    for found, end in zip(called, ends[1:]):
        function = kernel.functions[found[2]]
        function.first = len(kernel.statements)
        _Body(kernel, function).read(lines, text.count("\n", 0, found.end() - 1), end)
        function.last = len(kernel.statements)
    return kernel


def _formals(declared: str | None, function: str) -> list[tuple[str, int]]:
    """Name and bytes of each; they are known in their function alone."""
    made = []
    for one in split(declared or ""):
        found = _FORMAL.match(one.strip())
        if found is None:
            raise UnknownPtxError(f"{function}: {one!r} is passed")
        made.append((f"{found[2]}@{function}", bits(found[1]) // 8 * int(found[3] or 1)))
    return made


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

    def __init__(self, kernel: Kernel, function: Function | None = None):
        self.kernel = kernel
        self.function = function
        self.scopes: list[dict[str, str]] = [{}]
        self.source = ""
        if function:
            kernel.registers[function.way_back] = "b32"
            for name, size in (*function.results, *function.formals):
                self.scopes[0][name.partition("@")[0]] = name
                kernel.passed[name] = name, size
                kernel.registers |= {f"{name}#{byte}": "b8" for byte in range(size)}

    def read(self, lines: list[str], start: int, end: int) -> None:
        for number in range(start, end):
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
        elif part.startswith(".param"):
            for name, size in _formals(part, str(len(self.kernel.passed))):
                self.scopes[-1][name.partition("@")[0]] = name
                self.kernel.passed[name] = name, size
        elif part and part != ")" and not part.startswith("."):
            own = {name: other for scope in self.scopes for name, other in scope.items()}
            text = re.sub(r"%?[A-Za-z_]\w*", lambda m: own.get(m.group(), m.group()), part) if own else part
            if called := CALL.match(text):
                self._call(called)
            yield re.sub(r"\bret(\.uni)?$", f"ret {self.function.way_back}", text) if self.function else text

    def _call(self, called: re.Match[str]) -> None:
        """What is passed is the function's from here on."""
        function = self.kernel.functions.get(called["name"])
        if function is None or self.function is not None:
            raise UnknownPtxError(f"{self.kernel.name}: a call of {called['name']}, or one from within a function")
        for given, own in ((called["results"], function.results), (called["values"], function.formals)):
            names = split(given or "")
            have = [self.kernel.passed.get(name, ("", 0))[1] for name in names]
            if have != [size for _, size in own]:
                raise UnknownPtxError(f"{function.name}: got {have} bytes, expected {own}")
            self.kernel.passed |= dict(zip(names, own))

    def _declare(self, part: str) -> None:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", part)
        if found is None:
            raise UnknownPtxError(f"{self.kernel.name}: {part}")
        kind, names = found.groups()
        for name in (one.strip() for one in names.split(",")):
            many = re.match(r"(%?\w+)<(\d+)>", name)
            if many:
                names = [f"{many.group(1)}{n}" for n in range(int(many.group(2)))]
                if self.function:
                    self.scopes[-1] |= {name: f"{name}@{self.function.name}" for name in names}
                self.kernel.registers |= {self.scopes[-1].get(name, name): kind for name in names}
            elif len(self.scopes) > 1:
                self.scopes[-1][name] = f"{name}@{len(self.kernel.registers)}"
                self.kernel.registers[self.scopes[-1][name]] = kind
            else:
                self.kernel.registers[name] = kind
