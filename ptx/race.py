"""The smallest kernel in which Triton overwrites a tile that an asynchronous dot still reads: `python -m ptx.race`.

A tile that is loaded in a pipelined loop and both used in registers (here: summed) and multiplied by tl.dot gets
num_stages - 1 buffers on sm_90, but the dot of one iteration is waited for in the next one only: the copy issued in
between goes into the buffer that the tensor core reads. Triton 3.6.0 has it; triton-lang/triton issue #6691 and pull
request #7110 are about it. The rule for kernels of this package: a pipelined tile is used in registers or by tl.dot,
not by both; a second, volatile load serves the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .host import Host
from .program import How

# The version that was seen to have it.
VERSION = "3.6.0"
_LATE = (How("forward"), How("backward", late=True))


@triton.jit
def grads(z, g, out, bias, n, SUM: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """out = z^T g and bias = sum of g over n rows; SUM says where the sum takes g from."""
    c = tl.arange(0, C)
    r = tl.arange(0, R)
    acc = tl.zeros([C, R], tl.float32)
    total = tl.zeros([R], tl.float32)
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = g + rows[:, None] * R + r[None, :]
        mask = (rows < n)[:, None]
        g_tile = tl.load(at, mask=mask, other=0.0)
        z_tile = tl.load(z + rows[:, None] * C + c[None, :], mask=mask, other=0.0)
        if SUM == "tile":
            total += tl.sum(g_tile.to(tl.float32), axis=0)
        elif SUM == "again":
            total += tl.sum(tl.load(at, mask=mask, other=0.0, volatile=True).to(tl.float32), axis=0)
        acc = tl.dot(tl.trans(z_tile), g_tile, acc)
    tl.store(out + c[:, None] * R + r[None, :], acc)
    tl.store(bias + r, total)


@dataclass(frozen=True)
class Seen:
    """buffers: of the pipelined tiles, as Triton allots them. error: relative, of the late run. reports: all runs'."""

    buffers: tuple[int, ...]
    error: float
    reports: list[str]


def observe(sum_from: str, stages: int, arch: int = 90) -> Seen:
    """sum_from: "tile" (the one that is multiplied), "again" (a load of its own) or "none". stages: num_stages."""
    generator = torch.Generator().manual_seed(0)
    n, c, r = 200, 128, 64
    z, g = (torch.randn(n, k, generator=generator).bfloat16() for k in (c, r))
    out, bias = torch.full((c, r), float("nan")), torch.full((r,), float("nan"))
    host = Host(arch, orders=_LATE)
    host.launch(grads, (1,), z, g, out, bias, n, SUM=sum_from, ROWS=64, C=c, R=r, num_warps=4, num_stages=stages)
    want = z.double().T @ g.double()
    text = host.launches[-1].compiled.asm["ttgir"]
    buffers = tuple(map(int, re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x", text)))
    return Seen(buffers, ((out.double() - want).norm() / want.norm()).item(), host.reports)


def verdict(version: str, racing: bool) -> str | None:
    """What has changed since VERSION, or None."""
    if racing:
        return None
    return (
        f"triton {version} no longer has the race that {VERSION} has: the rule that a pipelined tile is used in "
        "registers or by tl.dot, not by both, can be lifted (CONTRIBUTING.md, ptx/race.py)"
    )


def main() -> None:
    for sum_from in ("tile", "again", "none"):
        for stages in (1, 2, 3, 4):
            seen = observe(sum_from, stages)
            print(
                f"triton {triton.__version__}, sum of g from {sum_from:5s}, num_stages {stages}: "
                f"buffers {seen.buffers}, late error {seen.error:.1e}, {len(seen.reports)} reports",
                flush=True,
            )


if __name__ == "__main__":
    main()
