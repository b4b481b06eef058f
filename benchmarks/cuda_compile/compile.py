"""Compiles csrc/ for every GPU it is meant for, with warnings as errors, and reads what came out.

nvcc compiles for sm_75 and newer, NVRTC 12.9 the device code for sm_70. No GPU is needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from adamix_kernels import _build
from adamix_kernels._build import BuildError, Compiled
from adamix_kernels._build.objects import objects_folder, planned, sources, with_includes
from adamix_kernels._build.schedule import compile_all, parallel
from adamix_kernels._build.toolchain import find_nvcc

from .. import ROOT
from .table import Row

LIBRARY = ROOT / "build" / "csrc" / "strict" / "_C.abi3.so"
ARCHITECTURES = ("75", "80", "90", "100", "120+PTX")
NVRTC = Path(__file__).with_name("nvrtc.py")
# Where the Makefile puts NVRTC.
WHEELS = Path(sys.prefix) / "nvrtc-12.9"


def compiled(jobs: int | None = None, wheels: Path = WHEELS, architectures: Sequence[str] = ARCHITECTURES) -> list[Row]:
    """A row of every kernel for sm_70 and each of the architectures; LIBRARY is linked on the way. Raises BuildError.

    wheels: folder of NVRTC's. What was compiled from the same contents before is taken from build/csrc.
    """
    csrc = _build.source_folder()
    jobs = parallel(jobs)
    nvcc, nvrtc = f"nvcc {find_nvcc().version}", f"nvrtc {nvrtc_version(wheels)}"
    # The quicker compiler first.
    found = [(each, nvrtc) for each in compile_nvrtc(csrc, wheels, jobs)]
    objects = _build.build_cuda(LIBRARY, strict=True, architectures=architectures, jobs=jobs)
    found += [(each, nvcc) for each in objects if each.source.suffix == ".cu"]
    with ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(lambda one: rows_of(one[0], csrc, one[1]), found))
    return sorted((row for part in parts for row in part), key=lambda row: row.key)


def compile_nvrtc(csrc: Path, wheels: Path, jobs: int, only: Collection[str] = ()) -> list[Compiled]:
    """The cubin for sm_70 of every .cu file, or of those of these names; BuildError with NVRTC's messages."""
    version = nvrtc_version(wheels)
    command = [sys.executable, str(NVRTC)]
    flags = ["--wheels", str(wheels), "-I", str(csrc)]
    driver = Path(command[1])
    with objects_folder(csrc, "nvrtc") as folder:

        def plan(source: Path) -> Compiled:
            return planned(command, flags, source, [*with_includes(source, csrc), driver], folder, (version,))

        wanted = [path for path in sources(csrc) if path.suffix == ".cu" and (not only or path.name in only)]
        return compile_all([plan(path) for path in wanted], jobs)


def nvrtc_version(wheels: Path) -> str:
    """Of the wheel in this folder; BuildError where there is none."""
    found = sorted(wheels.glob("nvidia_cuda_nvrtc_cu12-*.dist-info"))
    if not found:
        raise BuildError(f"no NVRTC in {wheels}; `make cuda` installs it")
    return found[-1].name.removesuffix(".dist-info").partition("-")[2]


def rows_of(compiled: Compiled, csrc: Path, compiler: str) -> list[Row]:
    """The rows of one object file, its log and its machine code."""
    source = source_fingerprint(compiled.source, csrc)
    command = [cuobjdump(), "-sass", str(compiled.object)]
    instructions = disassembled(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    rows = list(parsed(compiled.log))
    names = demangled([row.kernel for row in rows])
    found = []
    for row in rows:
        mma, async_copy = instructions[row.kernel, row.target]
        figures = dict(kernel=names[row.kernel], mma=mma, async_copy=async_copy)
        file = str(compiled.source.relative_to(csrc))
        found.append(replace(row, **figures, file=file, source=source, compiler=compiler))
    return found


def parsed(log: str) -> Iterator[Row]:
    """A row, under its mangled name, of every kernel in what ptxas -v printed; spills of what it calls are its own."""
    for part in log.split("Compiling entry function ")[1:]:
        name, target = re.match(r"'(\S+)' for 'sm_(\d+)\w*'", part).groups()
        stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        stack, stores, loads = (sum(map(int, column)) for column in zip(*stacks))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        yield Row(
            name, int(target), registers, stores, loads, stack, int(shared[1]) if shared else 0, *("", 0, "", "", "")
        )


def disassembled(sass: str) -> dict[tuple[str, int], tuple[str, int]]:
    """(mangled kernel, target) -> (its matrix instructions, bits of its widest cp.async), from cuobjdump -sass."""
    found: dict[tuple[str, int], tuple[set[str], set[int]]] = {}
    target, here = 0, None
    for line in sass.splitlines():
        if "code for sm_" in line:
            target = int(re.search(r"sm_(\d+)", line)[1])
        elif "Function : " in line:
            here = found.setdefault((line.partition("Function : ")[2].strip(), target), (set(), set()))
        elif "MMA." in line:
            here[0].add(re.sub(r"\.STEP\d", "", re.search(r"\b(\w*MMA\.[\w.]+)", line)[1]))
        elif "LDGSTS" in line:
            here[1].add(int((re.search(r"LDGSTS[\w.]*\.(64|128)\b", line) or (0, 32))[1]))
    return {key: ("+".join(sorted(mma)), max(bits, default=0)) for key, (mma, bits) in found.items()}


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Mangled -> the kernel's name and its template's arguments, as in "a_kernel<half 16 Inner:0>"."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    found = {}
    for name, text in zip(names, done.stdout.splitlines()):
        text = re.sub(r"\((\w+)\)(\d+)", r"\1:\2", text.replace("(anonymous namespace)::", "").replace("adamix::", ""))
        text = text.partition("(")[0].removeprefix("void ")
        found[name] = text.replace("__half", "half").replace("__nv_bfloat16", "bfloat16").replace(", ", " ")
    return found


def source_fingerprint(source: Path, csrc: Path) -> str:
    """Of a source and of all it includes from csrc/, without comments and layout."""
    texts = sorted(code_alone(path.read_text()) for path in with_includes(source, csrc))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def code_alone(text: str) -> str:
    """C++ without comments, its white space folded."""
    kept = re.sub(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', lambda match: match[1] or " ", text, flags=re.DOTALL)
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", kept)).strip()


def cuobjdump() -> str:
    """NVIDIA's disassembler: in $PATH, else that in the package triton; BuildError where there is none."""
    triton = importlib.util.find_spec("triton")
    places = [shutil.which("cuobjdump") or ""]
    places += [
        f"{folder}/backends/nvidia/bin/cuobjdump" for folder in (triton.submodule_search_locations if triton else ())
    ]
    found = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if found is None:
        raise BuildError("no cuobjdump in $PATH or in the package triton")
    return found
