"""Whether anything grows over 1,000 steps, and whether an op takes as much memory as its docstring says.

Growth: after a warm-up that has seen every size, 1,000 steps with other batches and experts each time may add no object
that Python's collector tracks, no tensor, no entry of the package's caches, and at most 1 MiB to the process.
Peaks: what PyTorch's CPU allocator hands out in one forward, and in its backward, is compared with the formulas in the
docstrings of the public functions, which are read from there and evaluated.

Backends as in `reliability.numerics`: the reference here, Triton interpreted and CUDA on the CPU in processes of their
own. The full size measures all three, the small size what this process has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from .. import kernel_children
from ..one_thread import one_thread
from ..record import Figure
from . import growth, peaks

TITLE = "Memory: growth over steps, and peaks against what is documented"
SHARE = 0.05
STEPS, WARM_UP = 1000, 200
_SMALL_STEPS, _SMALL_WARM_UP = 40, 20


def run(size: str, only: Sequence[str] | None = None) -> Iterator[Figure]:
    """only: the backends to measure; None for all of them in full, and in small for those this process has."""
    shared = kernel_children.share_out(f"{__name__}.child", size, only)
    measured = [name for name in shared.wanted if name not in shared.missing]
    yield Figure("backends measured", shared.said(measured), ", ".join(shared.wanted), not shared.missing)
    with one_thread():
        for name in shared.here:
            yield from of_backend(name, size)
    for child in shared.children.values():
        yield from (Figure(**figure) for figure in kernel_children.finish(child))


def of_backend(backend: str, size: str) -> Iterator[Figure]:
    """What this process can measure of a backend."""
    if backend == "reference":
        for method in ("adapter", "lora"):
            yield grows(f"training, {method}", growth.training(method), size)
    steps = growth.ops(backend, most=20 if backend == "reference" else 5)
    if backend == "triton" or size == "small":
        # A step costs the interpreter a hundred times what it costs the others.
        steps = {"every op by turns": growth.by_turns(steps)}
    for name, step in steps.items():
        yield grows(f"{name}, {backend}", step, size)
    for peak in peaks.peaks(backend, scale=4 if backend == "reference" else 2):
        yield peaked(peak, backend)


def grows(about: str, step, size: str) -> Figure:
    steps, warm_up = (STEPS, WARM_UP) if size == "full" else (_SMALL_STEPS, _SMALL_WARM_UP)
    started = time.perf_counter()
    added = growth.growth(step, steps, warm_up)
    found = list(growth.grown(added))
    value = f"{', '.join(found) or 'nothing'}; {added.resident / 1024:+,.0f} KiB resident"
    seconds = time.perf_counter() - started
    return Figure(f"{about}: grown over {steps:,} steps", value, "nothing; at most +1,024 KiB", not found, seconds)


def peaked(peak: peaks.Peak, backend: str) -> Figure:
    started = time.perf_counter()
    found, wanted = peaks.measured(peak, backend), peaks.documented(peak)
    value, expected = (f"forward {f:,.0f}, backward {b:,.0f} bytes" for f, b in (found, wanted))
    about = f"{peak.op.__name__}, {backend} ({peak.title}), {str(peak.leaves[0].dtype).removeprefix('torch.')}"
    fits = peaks.within(SHARE, found, wanted)
    return Figure(f"{about}: peak", value, f"{expected}, within {SHARE:.0%}", fits, time.perf_counter() - started)
