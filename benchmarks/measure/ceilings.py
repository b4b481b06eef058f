"""What this machine can do at best, measured in the same run: copying bytes, multiplying matrices."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from .clock import Effort, eager_seconds

EFFORT = Effort(0.3, 3, 11, warmup=2)


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes read + written a second by a copy. matmul: operations a second of a square product, by dtype."""

    copy: float
    matmul: dict[torch.dtype, float]

    def floor(self, moved: float, operations: float, dtype: torch.dtype) -> float:
        """Seconds below which no kernel that moves `moved` bytes and does `operations` can stay here."""
        return max(moved / self.copy, operations / self.matmul[dtype])


def measure(device: torch.device, dtypes: set[torch.dtype], *, smoke: bool) -> Ceilings:
    """Medians over copies of 2 GiB and products of 8192 x 8192 matrices of random numbers; on the CPU of 256 MiB and
    2048 x 2048; far smaller for smoke.
    """
    size, side = (2**22, 128) if smoke else (2**31, 8192) if device.type == "cuda" else (2**28, 2048)
    matmul = {dtype: 2 * side**3 / _product_seconds(device, dtype, side) for dtype in sorted(dtypes, key=str)}
    return Ceilings(2 * size / _copy_seconds(device, size), matmul)


def _copy_seconds(device: torch.device, size: int) -> float:
    source = torch.randint(127, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return statistics.median(eager_seconds(lambda k: target.copy_(source), device, EFFORT))


def _product_seconds(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return statistics.median(eager_seconds(lambda k: torch.mm(a, b, out=out), device, EFFORT))
