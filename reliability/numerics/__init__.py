"""How far every public op is from float64, in units of how far PyTorch is in the same dtype.

The error of a tensor is max |result - exact| / max |exact|, exact being the definition (`plain.py`) in float64 on the
same inputs, already rounded to the dtype. Its unit is what the same definition errs in PyTorch's own operations in that
dtype (for 16-bit dtypes in float32 too, whichever errs more: the same dtype may be right by underflow), but at least
half a spacing of the dtype at max |exact|, which rounding alone costs. For each case, dtype and scale (1e-6 to 1e4 by
decades, of activations, of banks, or of logits) both are the worst over fixed draws, of which the unit has more; a
figure is the largest ratio of one op, backend and direction: over its cases, its outputs or gradients, and the scales.

The reference runs in this process. The Triton kernels are interpreted in a child of it (which needs triton), the CUDA
kernels run in another one on the CPU (`python -m adamix_kernels._build --host plain` builds them into build/csrc, or
ADAMIX_CUDA_HOST names another build). The full size measures all three, the small size what this process has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from .. import kernel_children
from ..record import Figure
from .measure import Worst, of_backend, worst

TITLE = "Numerics: errors against float64, in units of PyTorch's own"
LIMIT = 2.0


def run(size: str, only: Sequence[str] | None = None) -> Iterator[Figure]:
    """only: the backends to measure; None for all of them in full, and in small for those this process has."""
    started = time.perf_counter()
    shared = kernel_children.share_out(f"{__name__}.measure", size, only)
    errors = {name: of_backend(name, size) for name in shared.here}
    errors |= {name: kernel_children.finish(child) for name, child in shared.children.items()}
    measured = [name for name in shared.wanted if name in errors]
    largest = worst(errors, size)
    seconds = time.perf_counter() - started
    yield Figure(
        "backends measured", shared.said(measured), ", ".join(shared.wanted), not shared.missing, seconds
    )  # fmt: skip
    yield from figures(largest)


def figures(largest: Sequence[Worst]) -> Iterator[Figure]:
    """One for each op, backend and direction, with the largest ratio in each dtype."""
    groups: dict[tuple[str, str, str], list[Worst]] = {}
    for one in largest:
        groups.setdefault((one.op, one.backend, one.direction), []).append(one)
    for (op, backend, direction), found in groups.items():
        words = [f"{w.dtype} {w.ratio:.2f} at {w.scale:.0e}" for w in found]
        top = max(found, key=lambda w: w.ratio)
        value = f"{', '.join(words)} (most: {top.where})"
        yield Figure(f"{op}, {backend}, {direction}", value, f"at most {LIMIT:g} times PyTorch's", top.ratio <= LIMIT)
