"""PTX of nvcc and NVRTC, which hold many kernels and say some things in their own way, as the executor reads it.

It is for counting, not for checking: a cluster's blocks run one after another, so what one reads or writes in another's
shared memory is its own. That decides values, hardly what is executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_ENTRY = re.compile(r"(?:\.visible |\.weak )?\.entry\s+(\w+)\s*\(")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)".*$', re.M)
_SECTION = re.compile(r"^\s*\.section\s.*", re.M | re.S)
_FUNCTION = re.compile(r"^(?:\.\w+ )*\.func\b[^;{]*?(\w+)\s*\([^){;]*\)\s*\{", re.M)
_PROTOTYPE = re.compile(r"^\.func\b[^;{]*;\n", re.M)
_CALL = re.compile(r"\bcall(\.uni)?\s[^;]*;")
_LOC = re.compile(r"^(\s*\.loc\s+(\d+) (\d+) (\d+)).*$", re.M)
_SHARED = re.compile(r"^\s*(?:\.extern )?\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\];.*$", re.M)
_PARAM_VECTOR = re.compile(r"ld\.param\.v(\d)\.(\w+)\s+\{([^}]*)\},\s*\[([^]+]+)(?:\+(-?\d+))?\]")


class Text(NamedTuple):
    """A kernel alone: compiled, as the assembler takes it; executed, as the executor reads it."""

    compiled: str
    executed: str


def kernels(text: str) -> dict[str, Text]:
    """The text of each kernel alone, and of the functions that it calls, by its mangled name."""
    names = dict(_FILE.findall(text))
    entries, functions = list(_ENTRY.finditer(text)), list(_FUNCTION.finditer(text))
    starts = sorted(match.start() for match in (*entries, *functions))
    parts = {start: _SECTION.sub("", text[start:end]) for start, end in zip(starts, [*starts[1:], len(text)])}
    head, found = _PROTOTYPE.sub("", text[: starts[0]]) if starts else "", {}
    shared = list(_SHARED.finditer(head))
    files = "".join(f'.file {number} "{name}"\n' for number, name in names.items())

    def told(part: str) -> str:
        return _LOC.sub(lambda m: f"{m[1]} // {names.get(m[2], '').rsplit('/', 1)[-1]}:{m[3]}:{m[4]}", part)

    for entry in entries:
        part = told(parts[entry.start()])
        called = "".join(told(parts[one.start()]) for one in functions if re.search(rf"\b{one[1]}\b", part))
        whole = head + _FILE.sub("", called + part) + files
        found[entry[1]] = Text(whole, _places(part + called, [m[2] for m in shared]))
    return found


def clustered(text: str, cluster: int) -> str:
    """The same for launches with clusters of so many blocks along x (1: without)."""
    text = re.sub(r"mov\.u32 (\S+), %cluster_nctarank;", rf"mov.u32 \1, {cluster};", text)
    return re.sub(r"mov\.u32 (\S+), %cluster_ctarank;", rf"rem.u32 \1, %ctaid.x, {cluster};", text)


def _places(text: str, dynamic: list[str]) -> str:
    """Static shared memory lies before the dynamic one, as the executor knows it: offsets from global_smem."""
    at, where = 0, {}
    for match in _SHARED.finditer(text):
        align, size = int(match[1]), int(match[3] or 0)
        at = -(-at // align) * align
        where[match[2]] = at
        at += size
    text = _SHARED.sub("", text)
    at = -(-at // 128) * 128
    where |= dict.fromkeys(dynamic, at)
    for name, offset in where.items():
        text = re.sub(rf"\b{name}\b", f"global_smem+{offset}" if offset else "global_smem", text)
    text = _CALL.sub(lambda call: " ".join(call[0].split()), text)
    text = "\n".join(_spelled(line) for line in text.splitlines())
    return f"// static shared bytes: {at}\n{text}"


def static_shared(text: str) -> int:
    """Bytes of static shared memory in a text of `kernels`."""
    return int(re.match(r"// static shared bytes: (\d+)", text)[1])


def _spelled(line: str) -> str:
    found = _PARAM_VECTOR.search(line)
    if found:
        return line[: found.start()] + "; ".join(_singly(*found.groups())) + line[found.end() :]
    line = re.sub(r"\bgriddepcontrol\.\w+;", "fence.acq_rel.gpu;", line)
    line = re.sub(r"\bcvta(\.to)?\.(global|shared)\.u64\b", "mov.u64", line)
    line = re.sub(r"\bmapa\.(?:shared::cluster\.)?(u\d+)(\s+\S+,\s*[^,;]+),[^;]*;", r"mov.\1\2;", line)
    line = line.replace("st.shared::cluster.", "st.shared.")
    line = re.sub(r"\bbarrier\.cluster\.arrive[\w.]*;", "fence.acq_rel.gpu;", line)
    return re.sub(r"\bbarrier\.cluster\.wait[\w.]*;", "bar.sync 0;", line)


def _singly(count: str, kind: str, registers: str, base: str, plus: str | None) -> Iterator[str]:
    size = int(re.sub(r"\D", "", kind)) // 8
    for n, register in enumerate(registers.split(",")):
        yield f"ld.param.{kind} {register.strip()}, [{base}+{int(plus or 0) + n * size}]"
