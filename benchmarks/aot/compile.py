"""The part of the ahead-of-time gate that touches Triton: the cases, their sources, one compilation."""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import re
import subprocess
import tempfile
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.runtime.errors import PTXASError

import adamix_kernels
from adamix_kernels._backends import OPS
from adamix_kernels.ops._triton_aot import AotCase

from .loops import lost
from .table import SHARED_LIMITS, Row

_INSTRUCTIONS = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
# Layout tokens do not change what is compiled.
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)


def described() -> Iterator[tuple[Row, AotCase]]:
    """(row without figures, case) of every op's aot_cases on every target."""
    for op in OPS:
        if not _has(op, "aot.py"):
            continue
        cases = importlib.import_module(f"adamix_kernels.ops.{op}.triton_impl.aot").aot_cases
        for target in SHARED_LIMITS:
            for case in cases(target):
                yield _described(case, target), case


def without_cases() -> list[str]:
    """Ops whose kernels the gate does not see, in words."""
    return [f"{op}: Triton kernels, but no triton_impl/aot.py" for op in OPS if _has(op) and not _has(op, "aot.py")]


def _has(op: str, file: str = "__init__.py") -> bool:
    return (Path(adamix_kernels.__file__).parent / "ops" / op / "triton_impl" / file).is_file()


@functools.cache
def _by_key() -> dict[tuple, tuple[Row, AotCase]]:
    return {row.key: (row, case) for row, case in described()}


def compile_keys(keys: Sequence[tuple]) -> tuple[list[Row], list[str]]:
    """(rows of the cases with these keys, what did not compile), compiled in this process."""
    made, failed = [], []
    for key in keys:
        row, case = _by_key()[key]
        try:
            compiled, names = _compile(row, case)
            made.append(compiled)
            failed += [
                f"{row}: Triton drops {name}, which an inner loop's bounds need: use it in an address" for name in names
            ]
        except (CompilationError, PTXASError, RuntimeError) as error:
            failed.append(f"{row}: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
    return made, failed


def _described(case: AotCase, target: int) -> Row:
    label = case.name.split("/")[1]
    constants = case.constexprs
    blocks = [constants[n] for n in ("ROWS", "BLOCK_M", "COLS", "BLOCK_C", "BLOCK") if n in constants]
    config = f"{'x'.join(map(str, blocks))} w{case.num_warps} s{case.num_stages}"
    if case.maxnreg:
        config += f" r{case.maxnreg}"
    identity = dict(kernel=case.fn.__name__, dtype=case.dtype, case=label, config=config, target=target)
    return Row(
        **identity, registers=None, spills=None, shared_bytes=None, tensor_columns=None, mma="",
        source=_fingerprint(case), triton=triton.__version__,
    )  # fmt: skip


def _compile(row: Row, case: AotCase) -> tuple[Row, list[str]]:
    """(the row with its figures, the variables of loops that were lost)."""
    source = ASTSource(case.fn, case.signature, constexprs=case.constexprs, attrs=case.attrs)
    options = dict(num_warps=case.num_warps, num_stages=case.num_stages, maxnreg=case.maxnreg)
    made = triton.compile(source, target=GPUTarget("cuda", row.target, 32), options=options)
    registers, local = _resources(made.asm["cubin"])
    filled = replace(
        row,
        registers=registers,
        spills=local // 4,
        shared_bytes=made.metadata.shared,
        tensor_columns=getattr(made.metadata, "tmem_size", None) or 0,
        mma=mma_kinds(made.asm["ttgir"], made.asm["ptx"]),
    )
    return filled, lost(made.asm["ttir"])


def mma_kinds(ttgir: str, ptx: str) -> str:
    """The matrix instructions in a kernel's PTX, "+" between them, ".tf32" where they take it; "fma" for other dots."""
    kinds = []
    for kind, mnemonic in _INSTRUCTIONS.items():
        lines = re.findall(rf"^.*{re.escape(mnemonic)}.*$", ptx, re.MULTILINE)
        if lines:
            kinds.append(f"{kind}.tf32" if any("tf32" in line for line in lines) else kind)
    # A dot that keeps a blocked layout is unrolled into scalar multiply-adds.
    if re.search(r"tt\.dot .*-> tensor<[^>]*#blocked", ttgir):
        kinds.append("fma")
    return "+".join(kinds)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a thread, as the driver would report them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def _fingerprint(case: AotCase) -> str:
    """Of all that decides the compiled code but the compiler: sources, constants, types, options."""
    parts = _sources(case.fn, set())
    parts += [f"{name}={case.constexprs[name]}" for name in sorted(case.constexprs)]
    parts += [f"{name}:{kind}" for name, kind in sorted(case.signature.items())]
    parts += [str(sorted(case.attrs.items())), str(case.num_warps), str(case.num_stages), str(case.maxnreg)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _sources(function, seen: set) -> list[str]:
    """The text of a kernel and of all it calls here, without comments, docstrings and line breaks inside brackets."""
    if function.fn in seen:
        return []
    seen.add(function.fn)
    text, names = _tokens(function.src)
    parts = [text]
    for name in names:
        value = function.fn.__globals__.get(name)
        if isinstance(value, triton.runtime.JITFunction) and value.fn.__module__.startswith("adamix_kernels"):
            parts += _sources(value, seen)
        elif isinstance(value, triton.language.constexpr):
            parts.append(f"{name}={value.value!r}")
    return parts


@functools.cache
def _tokens(source: str) -> tuple[str, list[str]]:
    """(the tokens that matter, in one string; the names among them, sorted)."""
    kept, names, statement = [], set(), True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _LAYOUT or (token.type in (tokenize.STRING, tokenize.NEWLINE) and statement):
            continue
        statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        kept.append(tokenize.tok_name[token.type] if statement else token.string)
        if token.type == tokenize.NAME:
            names.add(token.string)
    return " ".join(kept), sorted(names)
