"""Seconds, launches and bytes of one call, on the CPU and on a CUDA GPU, in eager mode and replayed from a graph.

triton.testing's timers call one set of inputs, which stays in the cache (or flush all of it), and time no CPU.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Calls go round through rotating inputs: call(k) takes set k.
Call = Callable[[int], object]


@dataclass(frozen=True)
class Effort:
    """How long one measurement may take: between `least` and `most` samples, about `seconds` where they fit."""

    seconds: float
    least: int
    most: int
    warmup: int = 3

    def samples(self, seconds_a_call: float) -> int:
        """Samples that fit the effort."""
        return max(self.least, min(self.most, int(self.seconds / max(seconds_a_call, 1e-9))))


# Seconds of work before anything is timed: an idle GPU's clock is a fifth of a busy one's, and takes a while to rise.
WARM = 0.05
_SIDE = 4096
FULL = Effort(seconds=0.1, least=7, most=101)
SMOKE = Effort(seconds=0.0, least=3, most=3, warmup=1)


def synchronize(device: torch.device) -> None:
    """Waits for the GPU; raises what a kernel before did wrong."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def _matrices(device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16) for _ in range(3))


def warm(device: torch.device) -> None:
    """Keeps a GPU busy for WARM seconds, with matrix products; waits for it. Nothing on the CPU."""
    if device.type != "cuda":
        return
    a, b, out = _matrices(device)
    ends = time.perf_counter() + WARM
    while time.perf_counter() < ends:
        for _ in range(8):
            torch.mm(a, b, out=out)
        synchronize(device)


def require_working(device: torch.device) -> None:
    """Raises RuntimeError when this process can no longer use the GPU, or its random numbers (a capture broke off)."""
    synchronize(device)
    if device.type == "cuda":
        torch.rand(1, device=device)
        synchronize(device)


def eager_seconds(call: Call, device: torch.device, effort: Effort) -> list[float]:
    """Seconds of each call: by the GPU's clock from before its first kernel to after its last, else by the CPU's."""
    # The first call may compile.
    call(0)
    synchronize(device)
    warm(device)
    start = time.perf_counter()
    for k in range(effort.warmup):
        call(k)
    synchronize(device)
    samples = effort.samples((time.perf_counter() - start) / effort.warmup)
    if device.type != "cuda":
        return [_cpu_seconds(call, k) for k in range(samples)]
    events = [(_event(), _event()) for _ in range(samples)]
    for k, (before, after) in enumerate(events):
        before.record()
        call(k)
        after.record()
    synchronize(device)
    return [before.elapsed_time(after) * 1e-3 for before, after in events]


def graph_seconds(
    call: Call, sets: int, effort: Effort, stream: torch.cuda.Stream | None = None
) -> list[float]:  # fmt: skip
    """Seconds a call, one for each replay of a CUDA graph that goes once through all `sets` inputs."""
    graph = capture(call, sets, stream)
    warm(torch.device("cuda", torch.cuda.current_device()))
    start = time.perf_counter()
    for _ in range(effort.warmup):
        graph.replay()
    torch.cuda.synchronize()
    samples = effort.samples((time.perf_counter() - start) / effort.warmup)
    events = [(_event(), _event()) for _ in range(samples)]
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e-3 / sets for before, after in events]


def capture(call: Call, sets: int, stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of call(0), ..., call(sets - 1), after one warm-up of each on the stream that captures."""
    side = torch.cuda.Stream() if stream is None else stream
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for k in range(sets):
            call(k)
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            for k in range(sets):
                call(k)
    torch.cuda.current_stream().wait_stream(side)
    return graph


def host_seconds(call: Call, device: torch.device, calls: int = 20) -> float:
    """Seconds the CPU is busy with one call: queueing `calls` of them without waiting for the GPU."""
    synchronize(device)
    start = time.perf_counter()
    for k in range(calls):
        call(k)
    taken = (time.perf_counter() - start) / calls
    synchronize(device)
    return taken


# Whether a profile was made: on the CPU, on a GPU.
_started = [False, False]


def launches(call: Call, device: torch.device) -> int:
    """What one call starts: kernels, copies and fills on a GPU; on the CPU, ATen calls that call no other."""
    # Else the profiler writes two lines to stderr each time.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    # The first profile of a process may miss what ran while the tracer started.
    first, _started[on_gpu] = not _started[on_gpu], True
    for _ in range(2 if on_gpu and first else 1):
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            call(0)
            synchronize(device)
    events = profiler.events()
    if on_gpu:
        seen = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
        if not seen:
            raise RuntimeError("the profiler saw no kernel")
        return len(seen)
    aten = [e for e in events if e.name.startswith("aten::")]
    return sum(not any(c.name.startswith("aten::") for c in e.cpu_children) for e in aten)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes by which one call raises the GPU memory in use at its peak; None on the CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(0)
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def rotation(set_bytes: int, device: torch.device, at_most: int = 32) -> int:
    """How many sets of inputs it takes that a call's own were evicted from the cache since it last ran."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(at_most, -(-2 * cache // max(set_bytes, 1)) + 1))


def nbytes(tensors: Sequence[object]) -> int:
    """Bytes of the tensors among `tensors`."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _cpu_seconds(call: Call, k: int) -> float:
    start = time.perf_counter()
    call(k)
    return time.perf_counter() - start
