"""Counts of the Triton kernels: the launches of a whole call, run in part by the executor of ptx/."""

from __future__ import annotations

import functools

import triton
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from ptx import host as hosts
from ptx.program import How

from ..ops.check import gradients
from . import cases as count_cases
from .cases import Work
from .launch import Counted, counted
from .memory import CountDraw, zeroed
from .sass import Code, assembled

# Blocks of a launch that run, and instructions after which no more of them begin.
BLOCKS, ENOUGH = 2048, 3_000_000
HOW = How(races=False, statistics=True, blocks_at_most=BLOCKS, enough=ENOUGH)


class TritonCounter:
    """Calls through backend="triton" as compiled for one target."""

    def __init__(self, target: int):
        self.target = target
        self.host = hosts.install(target)
        self.host.orders = (HOW,)
        self._codes: dict[int, Code] = {}

    def count(self, work: Work) -> list[Counted]:
        """Its launches, in their order."""
        zeroed(work.folder.startswith("gated_"))
        inputs = work.case.make(CountDraw(work.case.dtype))
        gradient = work.direction != "forward" or "backward" in work.case.traffic
        bound = count_cases.bound(work.case, "triton", inputs, gradient)
        self.host.launches.clear()
        out = bound.call()
        if work.direction == "backward":
            self.host.launches.clear()
        if work.direction != "forward":
            gradients(bound, inputs.grad, out)
        if self.host.reports:
            raise RuntimeError(f"{work}: {hosts.summary(self.host.reports)}")
        runs, self.host.launches = self.host.launches, []
        return [counted(run, self.target, self._code(run)) for run in runs]

    def _code(self, run: hosts.Launch) -> Code:
        key = id(run.program)
        if key not in self._codes:
            arch = sm_arch_from_capability(self.target)
            self._codes[key] = assembled(run.program.text, arch, get_ptxas(self.target).path, disassembler())
        return self._codes[key]


@functools.cache
def disassembler() -> str:
    """NVIDIA's, in the package triton."""
    return triton.knobs.nvidia.nvdisasm.path
