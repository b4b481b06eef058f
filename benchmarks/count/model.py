"""How fast a GPU can run what was counted: the formula, the GPUs' figures and where they come from.

    share of copy bandwidth = floor / (copy * sum over launches of (ramp + busy)), at most 1
    busy = (memory^4 + l2^4 + latency^4 + issue^4 + special^4 + shared^4)^(1/4)

The limits of a launch, in seconds; the fourth powers stand for work that overlaps, but never quite. The last four are
those of the multiprocessor that has the most blocks, ceil(blocks / multiprocessors):

    memory     device bytes / copy bandwidth
    l2         bytes loaded (past L1) or stored through L2, the more of the two, / its bandwidth in one direction
    latency    its blocks / blocks that run together * a block's waits: bytes that loads ask for / bytes in flight *
               latency, loop by loop, and 40 cycles for every barrier
    issue      its warp instructions / (clock * instructions a cycle)
    special    its exponentials, roots, reciprocals and sines / (clock * 16 lanes)
    shared     its passes over the banks of shared memory / clock

Instructions a cycle: 4 schedulers issue one each at best. Kernels of this kind reach 2 to 2.5 with 16 warps on a
multiprocessor, fewer with fewer warps; the model takes 2.5 * min(1, sqrt(warps / 16)).
Latency: memory's, L2's and L1's, by the parts of what is loaded that come from there. Memory's rises from that of an
idle GPU to that at full load with memory's share of the launch's time; at full load it is, by Little's law, the bytes
in flight that a multiprocessor needs, times their number, over copy bandwidth. L2's is 0.55 of memory's when idle,
L1's 0.09. L1 holds what a block touched within its last 32 KB (not for cp.async).
Ramp: a launch's start and end, 2 microseconds; 1 for one that is made ready while the launch before it ends
(programmatic dependent launch).
Device bytes: every launch's distinct bytes, and what does not stay in L2. L2 replaces at random: a sector is still
there with probability exp(-b / L2) after b other bytes came in. For a block that reads a sector again past L1, b is
what it brought in since, times the blocks that run beside it; for what an earlier launch of the op left, all that came
since.
What several blocks of a launch read is read from memory once.

Nothing here was measured on a GPU but what SOURCES says. Expect plus or minus 8 points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gpu:
    """name; target: 10 * compute capability of the code that is counted for it (B200 runs sm_90's counts: the executor
    has no sm_100). copy: bytes a second, read + written, as a copy measures. l2: bytes; l2_rate: bytes a second.
    needed: bytes in flight on a multiprocessor that fill the memory. clock: cycles a second. idle: latency of memory
    that is not busy, in seconds.
    """

    name: str
    target: int
    multiprocessors: int
    clock: float
    copy: float
    l2: float
    l2_rate: float
    needed: float
    idle: float

    def latency(self, busy: float) -> float:
        """Of memory that is busy to this part, in seconds."""
        return self.idle + busy * (self.needed * self.multiprocessors / self.copy - self.idle)


GPUS = (
    Gpu("V100", 70, 80, 1.53e9, 0.79e12, 6e6, 2.2e12, 6e3, 0.29e-6),
    Gpu("A100", 80, 108, 1.41e9, 1.35e12, 40e6, 4.0e12, 9e3, 0.33e-6),
    Gpu("H100", 90, 132, 1.755e9, 2.95e12, 50e6, 5.5e12, 18e3, 0.28e-6),
    Gpu("H200", 90, 132, 1.755e9, 4.30e12, 50e6, 5.5e12, 26e3, 0.28e-6),
    Gpu("B200", 90, 148, 1.85e9, 7.00e12, 126e6, 10e12, 50e3, 0.35e-6),
)
SOURCES = {
    "multiprocessors, clock, L2": "NVIDIA's data sheets (boost clocks; the A100 with 40 GB)",
    "copy": "H200 measured, reads and writes; the others as large copies are reported: 0.88 to 0.9 of the data sheet",
    "l2_rate": "V100 2.2 TB/s (Jia and others, 2018); H100 5.5 (Chips and Cheese, 2023), the same chip in H200; A100 "
    "4.0 and B200 10 are guesses between and above",
    "needed": "copy / multiprocessors * 0.6 to 0.8 microseconds of loaded latency, rounded up; B200 by its bandwidth",
    "latency": "about 470 cycles of memory, 260 of L2 and 40 of L1, as microbenchmarks of the A100 and H100 have them "
    "(Luo and others, 2024); V100 and B200 likewise",
    "barrier": "about 30 cycles for the slowest path of an empty one; what its warps wait for each other is not in it",
    "ramp": "2 microseconds for one launch behind another, and half of that where a dependent launch is made ready "
    "before, are guesses",
    "instructions a cycle": "4 by design; 2 to 2.5 as NVIDIA's own tuned kernels of norms and losses show in profiles",
}
ISSUE, WARPS, RAMP, READY, LANES, L2, L1, OVERLAP, BARRIER = 2.5, 16, 2e-6, 1e-6, 16, 0.55, 0.09, 4, 40


@dataclass(frozen=True)
class Launch:
    """What was counted of one launch, whole grid.

    instructions: of warps, machine code. special: those among them for the special function units. distinct: bytes
    read and written, each once. again: (bytes that a block read again past L1, bytes that it brought in since).
    loaded, stored: bytes through L2, with repetitions, and L1's; missed: those loaded that are not in L1. bank_waves:
    passes over shared memory. waits: (times that blocks wait for loads, the part of what they wait for that is not in
    L1), loop by loop. in_flight: bytes not in L1 that a block has asked for when it waits. barriers: that blocks pass.
    ranges: of every tensor its address and distinct bytes, for what an earlier launch left. dependent: whether it is
    made ready while the launch before it ends.
    """

    kernel: str
    blocks: int
    warps: int
    resident: int
    instructions: float
    special: float
    distinct: float
    again: Sequence[tuple[float, float]]
    loaded: float
    missed: float
    stored: float
    bank_waves: float
    waits: Sequence[tuple[float, float]]
    barriers: float
    in_flight: float
    ranges: dict[int, float] = field(default_factory=dict)
    dependent: bool = False


@dataclass(frozen=True)
class Time:
    """Of one launch: seconds, the limit's name, device bytes, and every limit's seconds."""

    seconds: float
    limit: str
    device: float
    limits: dict[str, float]


def together(launch: Launch, gpu: Gpu) -> int:
    """Blocks that run at the same time."""
    return min(launch.blocks, launch.resident * gpu.multiprocessors)


def device_bytes(launch: Launch, gpu: Gpu, before: Sequence[Launch] = ()) -> float:
    """What the launch moves to and from memory; before: the op's launches ahead of it."""
    beside = together(launch, gpu)
    missed = sum(count * -math.expm1(-since * beside / gpu.l2) for count, since in launch.again)
    left = 0.0
    for low, held in launch.ranges.items():
        since = launch.distinct / 2
        for earlier in reversed(before):
            if low in earlier.ranges:
                left += min(held, earlier.ranges[low]) * math.exp(-(since + earlier.distinct / 2) / gpu.l2)
                break
            since += earlier.distinct
    return launch.distinct + missed - left


def instructions_a_cycle(warps: float) -> float:
    """Of one multiprocessor that runs so many warps."""
    return ISSUE * min(1.0, math.sqrt(warps / WARPS))


def time(launch: Launch, gpu: Gpu, before: Sequence[Launch] = ()) -> Time:
    """The prediction for one launch."""
    device = device_bytes(launch, gpu, before)
    blocks = math.ceil(launch.blocks / gpu.multiprocessors)
    beside = min(blocks, launch.resident)
    # Of all blocks, the part that the fullest multiprocessor has.
    part = blocks / launch.blocks
    far = min(1.0, device / max(1.0, launch.missed + launch.stored))
    limits = {
        "memory": device / gpu.copy,
        "l2": max(launch.missed, launch.stored) / gpu.l2_rate,
        "latency": 0.0,
        "issue": part * launch.instructions / (gpu.clock * instructions_a_cycle(beside * launch.warps)),
        "special": part * launch.special * 32 / (gpu.clock * LANES),
        "shared": part * launch.bank_waves / gpu.clock,
    }
    loaded = 0.0
    # First as if the memory were idle, then as busy as that makes it.
    for _ in range(2):
        beyond = far * gpu.latency(loaded) + (1 - far) * L2 * gpu.idle
        waited = sum(times * (missed * beyond + (1 - missed) * L1 * gpu.idle) for times, missed in launch.waits)
        limits["latency"] = part * (waited + launch.barriers * BARRIER / gpu.clock) / beside
        busy = sum(seconds**OVERLAP for seconds in limits.values()) ** (1 / OVERLAP)
        loaded = limits["memory"] / busy if busy else 0.0
    ramp = READY if launch.dependent else RAMP
    limit = "launch" if busy < ramp else max(limits, key=lambda name: limits[name])
    return Time(ramp + busy, limit, device, limits)


def times(launches: Sequence[Launch], gpu: Gpu) -> list[Time]:
    """Of an op's launches, in their order."""
    return [time(one, gpu, launches[:n]) for n, one in enumerate(launches)]


def share(launches: Sequence[Launch], gpu: Gpu, floor: float) -> float:
    """Predicted share of copy bandwidth, `floor` bytes being the fewest; 0 to 1."""
    spent = sum(one.seconds for one in times(launches, gpu))
    return min(1.0, floor / gpu.copy / spent) if spent else 1.0
