"""Makes backend="triton" run the PTX that Triton compiles for it, on CPU tensors.

`install(arch)` before any op is used, in a process without TRITON_INTERPRET. Every launch is specialised and compiled
as Triton's JIT would on a GPU of that compute capability, and then executed in several orders of warps and blocks.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .program import How, Outcome, Program, Span

# All of these see every launch; the last one's results stay. Early and late: when a wgmma reads.
ALL_ORDERS = (
    How("forward", "forward"),
    How("backward", "backward", late=True),
    How("slices", "slices", late=True),
)


@dataclass
class Launch:
    kernel: str
    grid: tuple[int, ...]
    warps: int
    shared: int
    seconds: float
    outcome: Outcome
    program: Program
    compiled: Any
    spans: list[Span]
    statistics: Any = None


@dataclass
class Host:
    """What was launched and found since install(). orders: see ALL_ORDERS. kernels: by specialisation, compiled."""

    arch: int
    orders: tuple[How, ...] = ALL_ORDERS
    seed: int = 0
    launches: list[Launch] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)
    kernels: dict[str, tuple[Any, Program, dict[str, str]]] = field(default_factory=dict)
    compile_seconds: float = 0.0

    @property
    def reached(self) -> set[str]:
        """The names of the kernels that ran."""
        return {launch.kernel for launch in self.launches}

    def __str__(self) -> str:
        ran = f"{len(self.launches)} launches of {len(self.kernels)} compiled kernels"
        return f"{ran}, {self.compile_seconds:.0f} s compiling"

    def begin(self) -> None:
        """A test or a drawn call begins: nothing is reported yet, and what is random is drawn anew."""
        self.reports.clear()
        self.seed += 1

    @functools.cached_property
    def _compiler(self) -> _Compiler:
        return _Compiler(self.arch)

    def compiled(self, kernel, args, meta):
        """(compiled kernel, Program, signature, arguments by name) of one launch."""
        key, bound, build = self._compiler.bound(kernel, args, meta)
        if key not in self.kernels:
            began = time.perf_counter()
            self.kernels[key] = build()
            self.compile_seconds += time.perf_counter() - began
        return (*self.kernels[key], bound)

    def specialised(self, kernel, args, meta) -> str:
        """What tells the compiled kernel of this launch from others of the same kernel; nothing is compiled."""
        return self._compiler.bound(kernel, args, meta)[0]

    def launch(self, kernel, grid: tuple[int, ...], *args, **meta) -> None:
        """Launches a Triton kernel: kernel[grid](*args, **meta)."""
        if 0 in grid:
            return
        made, program, signature, bound = self.compiled(kernel, args, meta)
        spans, values = _arguments(signature, bound)
        if "banks" in kernel.__name__ or bound.get("places") is not None:
            # The others are found from distances to the first: the caller's own tensors.
            spans += _callers_tensors()
        spans = _joined(spans)
        before = [bytes(memory(span)) for span in spans] if len(self.orders) > 1 else []
        shape = made.metadata.num_warps, made.metadata.shared
        first, began = None, time.perf_counter()
        for how in self.orders:
            how = replace(how, seed=self.seed)
            for span, held in zip(spans, before if first else []):
                memory(span)[:] = held
            outcome = program.launch(grid, values, *shape, spans, how)
            self.reports += [f"{report} [warps {how.order}]" for report in outcome.reports]
            after = [bytes(memory(span)) for span in spans] if before else []
            if first and not outcome.reports:
                self.reports += _differences(program.name, spans, first, after, how)
            first = first or after
        seconds = time.perf_counter() - began
        counted = program.statistics() if self.orders[-1].statistics else None
        self.launches.append(
            Launch(kernel.__name__, tuple(grid), *shape, seconds, outcome, program, made, spans, counted)
        )


class HostError(RuntimeError):
    """This process cannot run compiled kernels; the message says why."""


# The one installed last; what was imported meanwhile holds functions that ask for it.
_current: list[Host] = []


def install(arch: int = 80) -> Host:
    """backend="triton" compiles for `arch` (10 * compute capability) and runs on CPU tensors from now on, until
    another `arch` is installed."""
    import triton

    if triton.knobs.runtime.interpret:
        raise HostError("TRITON_INTERPRET: got 1, expected it unset: kernels are compiled here, not interpreted")
    import adamix_kernels._backends as backends
    import adamix_kernels._triton_utils as utils

    _current.append(Host(arch))
    if len(_current) > 1:
        return _current[-1]
    environment = backends._environment_problem
    backends._environment_problem = lambda backend: None if backend == "triton" else environment(backend)
    problem = utils.problem
    utils.LAUNCHER_IS_KNOWN = False
    utils.capability = lambda device: _current[-1].arch
    utils.problem = lambda device_type, dtype: problem("cuda", dtype)
    utils.launch = lambda kernel, grid, device, *args, **meta: _current[-1].launch(kernel, grid, *args, **meta)
    return _current[-1]


class _Compiler:
    """Kernels as Triton's JIT specialises them, to PTX alone: the assembler behind it has no part in this."""

    def __init__(self, arch: int):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend

        self.target = GPUTarget("cuda", arch, 32)
        self.backend = make_backend(self.target)
        self.mode = triton.knobs.compilation.instrumentation_mode
        self._binders: dict[Any, Any] = {}
        _without_assembler()

    def bound(self, kernel, args, meta):
        """(what tells one specialisation from another, arguments by name, what compiles it)."""
        from triton.runtime.jit import create_function_from_signature

        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        given = dict(meta, debug=False, instrumentation_mode=self.mode)
        bound, specialization, options = self._binders[kernel](*args, **given)
        constants = {p.name: bound[p.name] for p in kernel.params if p.is_constexpr}
        key = f"{kernel.fn.__module__}.{kernel.fn.__qualname__} {specialization} {options} {constants}"
        return key, bound, functools.partial(self._build, kernel, given, bound, specialization, options)

    def _build(self, kernel, given, bound, specialization, options):
        import triton
        from triton.compiler import ASTSource

        packed, *described = kernel._pack_args(self.backend, given, bound, specialization, options)
        made = triton.compile(ASTSource(kernel, *described), target=self.target, options=packed.__dict__)
        return made, Program(made.asm["ptx"]), described[0]


def _without_assembler() -> None:
    """Leaves ptxas out; so that Triton's own cache never sees an empty binary, kernels are kept in a folder apart:
    PTX_CACHE, or one that goes with this process."""
    import triton

    if triton.knobs.runtime.add_stages_inspection_hook is not None:
        return
    folder = os.environ.get("PTX_CACHE")
    if folder is None:
        folder = tempfile.mkdtemp(prefix="ptx-cache-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    triton.knobs.cache.dir = folder

    def hook(backend, stages, options, language, capability):
        stages["cubin"] = lambda source, metadata: b""

    triton.knobs.runtime.add_stages_inspection_hook = hook


def _arguments(signature: dict[str, str], bound: dict[str, Any]) -> tuple[list[Span], list[int | float]]:
    spans: list[Span] = []
    values: list[int | float] = []
    for (name, kind), value in zip(signature.items(), bound.values(), strict=True):
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            values.append(value.data_ptr())
            spans += extent(name, value)
        elif kind.startswith("fp"):
            values.append(float(value))
        elif kind.startswith(("i", "u")):
            values.append(int(value))
        else:
            raise HostError(f"{name}: got an argument of type {kind}, expected a tensor, an integer or a float")
    return spans, values


def extent(name: str, t: torch.Tensor) -> list[Span]:
    """The memory from a tensor's first number to its last, [] for an empty one."""
    if not t.numel():
        return []
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return [Span(t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize, name)]


def _callers_tensors() -> list[Span]:
    spans = []
    frame = sys._getframe(2)
    for _ in range(4):
        if frame is None:
            break
        for name, value in frame.f_locals.items():
            for label, t in _tensors(name, value):
                spans += extent(label, t)
        frame = frame.f_back
    return spans


def _tensors(name: str, value) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        yield name, value
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors(f"{name}[{number}]", item)


def _joined(spans: list[Span]) -> list[Span]:
    """Without those that another holds, the largest first."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda s: s.low - s.high):
        if not any(other.low <= span.low and span.high <= other.high for other in kept):
            kept.append(span)
    return kept


def memory(span: Span) -> memoryview:
    """The bytes themselves."""
    return memoryview((ctypes.c_uint8 * (span.high - span.low)).from_address(span.low)).cast("B")


def _differences(name: str, spans: list[Span], first: list[bytes], after: list[bytes], how: How) -> list[str]:
    """Results that depend on the order of warps and blocks: somewhere there is a race."""
    return [
        f"{name}: other results with warps {how.order} than with warps forward, in {span.name}"
        for span, one, other in zip(spans, first, after, strict=True)
        if one != other
    ]


def summary(reports: list[str], most: int = 6) -> str:
    """The first reports, and how many more there are."""
    more = [f"and {len(reports) - most} more"] if len(reports) > most else []
    return "\n".join([*reports[:most], *more])
