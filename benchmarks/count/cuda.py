"""Counts of csrc/'s kernels: the launches of a whole call on the CPU, where the kernels' PTX runs in their place."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from adamix_kernels import _build
from adamix_kernels._build.objects import sources, with_includes
from adamix_kernels._build.toolchain import find_nvcc
from ptx import host as hosts
from ptx import nvcc
from ptx.program import Program

from .. import ROOT
from ..cuda_compile.compile import NVRTC, WHEELS, demangled, nvrtc_version
from ..ops.check import gradients
from . import cases as count_cases
from . import model as count_model
from .cases import Work
from .launch import Counted, counted
from .memory import CountDraw, spans, zeroed
from .sass import Code, assembled
from .triton import HOW, disassembler

# Bytes of shared memory that one block may ask for.
_SHARED = {70: 98_304, 80: 166_912, 90: 232_448}
_TAKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int), ctypes.c_void_p, ctypes.c_int)
_CACHE = ROOT / "build" / "count"
# All its blocks run at 8,192 rows: which planes the next launch reads is what each of them has left.
_ONE_PASS, _ENOUGH = "_one_pass_kernel", 8_000_000


class CudaCounter:
    """Calls through backend="cuda" as compiled for one target."""

    def __init__(self, target: int):
        self.target = target
        _on_host(target)
        self._texts: dict[str, nvcc.Text] = {}
        # Files that are not compiled yet; the next one is the last.
        self._left = _sources()
        self._programs: dict[tuple[str, int], Program] = {}
        self._codes: dict[str, Code] = {}
        self._names = _addresses()
        self._runs: list[hosts.Launch] = []
        self._known: list[torch.Tensor] = []
        self._error: Exception | None = None
        self._taker = _TAKER(self._take)

    def count(self, work: Work) -> list[Counted]:
        """Its launches, in their order."""
        _on_host(self.target)
        self._left.sort(key=lambda path: (work.folder.startswith(path.parent.name), path.parent.name == "common"))
        zeroed(work.folder.startswith("gated_"))
        inputs = work.case.make(CountDraw(work.case.dtype))
        gradient = work.direction != "forward" or "backward" in work.case.traffic
        bound = count_cases.bound(work.case, "cuda", inputs, gradient)
        self._known = [t for t in (*inputs.leaves, *inputs.extra, inputs.grad) if isinstance(t, torch.Tensor)]
        self._runs, self._error = [], None
        library().adamix_host_take_launches(self._taker)
        try:
            out = bound.call()
            if work.direction == "backward":
                self._runs = []
            if work.direction != "forward":
                gradients(bound, inputs.grad, out)
        finally:
            library().adamix_host_take_launches(None)
            self._known = []
        if self._error is not None:
            raise self._error
        return [
            counted(run, self.target, self._code(run.kernel), "griddepcontrol.wait" in self._texts[run.kernel].compiled)
            for run in self._runs
        ]

    def _take(self, kernel: int, sizes, argument: int, size: int) -> None:
        try:
            self._runs.append(self._run(self._names[kernel], list(sizes[:6]), ctypes.string_at(argument, size)))
        except Exception as error:
            self._error = self._error or error

    def _run(self, name: str, sizes: Sequence[int], argument: bytes) -> hosts.Launch:
        *grid, threads, dynamic, cluster = sizes
        key = name, cluster
        while name not in self._texts:
            self._texts |= _texts(self._left.pop(), self.target)
        text = self._texts[name].executed
        if key not in self._programs:
            self._programs[key] = Program(nvcc.clustered(text, cluster))
        program, shared = self._programs[key], nvcc.static_shared(text) + dynamic
        ranges = spans(argument, self._known)
        how = replace(HOW, zeros=cluster > 1, enough=_ENOUGH if _ONE_PASS in name else HOW.enough)
        began = time.perf_counter()
        outcome = program.launch(grid, [argument], threads // 32, shared, ranges, how)
        wrong = [report for report in outcome.reports if "bounds" in report or "misaligned" in report]
        if wrong:
            raise RuntimeError(hosts.summary(wrong))
        return hosts.Launch(
            name, tuple(grid), threads // 32, shared, time.perf_counter() - began, outcome, program, None, ranges,
            program.statistics(),
        )  # fmt: skip

    def _code(self, name: str) -> Code:
        if name not in self._codes:
            ptxas = str(WHEELS / "nvidia/cuda_nvcc/bin/ptxas") if self.target == 70 else _ptxas()
            self._codes[name] = assembled(self._texts[name].compiled, f"sm_{self.target}", ptxas, disassembler())
        return self._codes[name]


def _on_host(target: int) -> None:
    """backend="cuda" takes CPU tensors, and its launchers see a GPU of this target."""
    gpu = next(gpu for gpu in count_model.GPUS if gpu.target == target)
    os.environ["ADAMIX_HOST_CAPABILITY"], os.environ["ADAMIX_HOST_SHARED"] = str(target), str(_SHARED[target])
    os.environ["ADAMIX_HOST_MULTIPROCESSORS"] = str(gpu.multiprocessors)
    os.environ["ADAMIX_CUDA_HOST"] = str(_library_path())


@functools.cache
def _library_path() -> Path:
    return _build.build_host("plain")


@functools.cache
def library() -> ctypes.CDLL:
    """The emulation of csrc/, as backend="cuda" loads it."""
    return ctypes.CDLL(str(_library_path()))


def _addresses() -> dict[int, str]:
    """Where each kernel lies in this process -> its name as in benchmarks/results/cuda_compile.csv."""
    listed = subprocess.run(["nm", str(_library_path())], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in listed.splitlines()]
    found = {symbol: int(at, 16) for at, _, symbol in (line for line in lines if len(line) == 3)}
    shift = ctypes.cast(library().adamix_host_take_launches, ctypes.c_void_p).value - found["adamix_host_take_launches"]
    kernels = [symbol for symbol in found if "_kernel" in symbol and symbol.startswith("_ZN6adamix")]
    names = demangled(kernels)
    return {found[symbol] + shift: names[symbol] for symbol in kernels}


def _sources() -> list[Path]:
    return [path for path in sources(_build.source_folder()) if path.suffix == ".cu" and path.parent.name != "host"]


def _texts(source: Path, target: int) -> dict[str, nvcc.Text]:
    """A file's kernels by their names."""
    made = nvcc.kernels(_ptx(source, target))
    names = demangled(list(made))
    return {names[mangled]: text for mangled, text in made.items()}


def _ptx(source: Path, target: int) -> str:
    """The PTX of a file; what was compiled from the same contents before is taken from build/count."""
    csrc = _build.source_folder()
    version = nvrtc_version(WHEELS) if target == 70 else find_nvcc().version
    digest = hashlib.sha256(f"{version} {target} with lines".encode())
    for path in sorted(with_includes(source, csrc)):
        digest.update(path.read_bytes())
    kept = _CACHE / f"{source.stem}-sm_{target}-{digest.hexdigest()[:16]}.ptx"
    if not kept.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        if target == 70:
            driver = [
                sys.executable,
                str(NVRTC),
                "--wheels",
                str(WHEELS),
                "--ptx",
                "--lineinfo",
            ]
        else:
            driver = [str(find_nvcc().path), "-ptx", f"-arch=sm_{target}", "-std=c++17", "-lineinfo"]
        subprocess.run([*driver, "-I", str(csrc), str(source), "-o", str(part)], check=True, capture_output=True)
        part.rename(kept)
    return kept.read_text()


def _ptxas() -> str:
    beside = Path(find_nvcc().path).with_name("ptxas")
    return str(beside) if beside.exists() else shutil.which("ptxas") or "ptxas"
