"""The calls whose host time is measured, each with the launches that it owes."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adamix_kernels import adamix_loss, consistency_loss, merge_experts, routed_adapter, routed_lora
from adamix_kernels.ops.merge.api import merge_banks

from . import driver as host_driver

BACKENDS = ("triton", "cuda")
# Tensors so small that malloc costs what a GPU's caching allocator does (it tidies up after a block of 64 KiB), rows so
# many that a backward sums them in parts, by a launch more.
BATCH, TOKENS, HIDDEN, RANK, EXPERTS, DTYPE = 8, 128, 16, 8, 2, torch.bfloat16
# Kernels launched by a backend in this process so far.
_COUNTS: dict[str, Callable[[], int]] = {}


@dataclass(frozen=True)
class HostCase:
    """call(), which launches `least` to `most` kernels."""

    name: str
    call: Callable[[], object]
    count: Callable[[], int]
    least: int
    most: int

    def problem(self) -> str | None:
        """What is wrong with the launches of the first calls, which plan, and of a later one; None for nothing."""
        for _ in range(3):
            before = self.count()
            self.call()
            launched = self.count() - before
            if not self.least <= launched <= self.most:
                return f"{launched} launches, expected {self.least} to {self.most}"
        return None


def prepare(backend: str) -> str | None:
    """Makes `backend` take CPU tensors and launch nothing, for the rest of the process; why it cannot, or None."""
    if backend in _COUNTS:
        return None
    if backend == "triton":
        try:
            _COUNTS[backend] = host_driver.install()
        except (ImportError, OSError, RuntimeError) as error:
            return str(error)
        return None
    from adamix_kernels import _extension

    if not _extension.on_host():
        return "ADAMIX_CUDA_HOST names no library (python -m adamix_kernels._build --host plain makes it)"
    problem = _extension.problem()
    if problem is None and os.environ.get("ADAMIX_HOST_IDLE") != "1":
        problem = "ADAMIX_HOST_IDLE is not 1, so kernels would run"
    if problem is None:
        from adamix_kernels.ops import _checks
        from adamix_kernels.routing import draws

        _checks.values_at_hand = lambda index: False
        draws.draws_ahead = lambda device: True
        _COUNTS[backend] = _CudaLaunches(str(_extension.library_path()))
    return problem


class _CudaLaunches:
    def __init__(self, path: str):
        self._take = ctypes.CDLL(path).adamix_host_launches
        self._take.restype = ctypes.c_char_p
        self._count = 0

    def __call__(self) -> int:
        self._count += len(self._take().splitlines())
        return self._count


def cases(backend: str) -> Iterator[HostCase]:
    """Every measured call of `backend`; where a backward is part of it, of every floating argument."""
    made = (*_adapter(backend), *_lora(backend), *_gated(backend), *_loss(backend), *_merge(backend), *_floor())
    for name, call, least, most in made:
        yield HostCase(name, call, _COUNTS[backend], least, most)


Call = tuple[str, Callable[[], object], int, int]


def _adapter(backend: str) -> Iterator[Call]:
    x = _randn(BATCH, TOKENS, HIDDEN)
    banks = _randn(EXPERTS, RANK, HIDDEN), _randn(EXPERTS, RANK), _randn(1, HIDDEN, RANK), _randn(1, HIDDEN)
    index = torch.zeros(BATCH, dtype=torch.int64)

    def call(x: torch.Tensor, *banks: torch.Tensor) -> torch.Tensor:
        return routed_adapter(x, *banks, index, None, residual=x, backend=backend)

    yield from _modes("routed_adapter", call, (x, *banks), backward=3)


def _lora(backend: str) -> Iterator[Call]:
    width = 3 * HIDDEN
    x, base = _randn(BATCH, TOKENS, HIDDEN), _randn(BATCH, TOKENS, width)
    a, b = _randn(EXPERTS, 2 * RANK, HIDDEN), _randn(1, 2 * HIDDEN, RANK)
    index = torch.zeros(BATCH, dtype=torch.int64)

    def call(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        target = base.detach() if inplace else base
        return routed_lora(
            x, a, b, index, None, base=target, scaling=0.5, groups=2, output_offsets=(0, 2 * HIDDEN), inplace=inplace,
            backend=backend,
        )  # fmt: skip

    yield from _modes("routed_lora", call, (x, a, b), backward=3)
    yield from _modes("routed_lora, in place", functools.partial(call, inplace=True), (x, a, b), backward=3)


def _gated(backend: str) -> Iterator[Call]:
    experts, slots, width = 2 * EXPERTS, 2, 2 * HIDDEN
    x, base = _randn(BATCH, TOKENS, HIDDEN), _randn(BATCH, TOKENS, width)
    banks = _randn(experts, RANK, HIDDEN), _randn(experts, RANK), _randn(experts, HIDDEN, RANK), _randn(experts, HIDDEN)
    factors = _randn(experts, RANK, HIDDEN), _randn(experts, width, RANK)
    chosen = torch.arange(slots).expand(BATCH, TOKENS, slots).contiguous()
    for kind, index, columns in (("dense gates", None, experts), (f"top-{slots} of {experts} gates", chosen, slots)):
        gates = _randn(BATCH, TOKENS, columns)

        def adapter(x: torch.Tensor, gates: torch.Tensor, *banks: torch.Tensor, index: Any = index) -> torch.Tensor:
            return routed_adapter(x, *banks, index, index, residual=x, gates=gates, backend=backend)

        def lora(x: torch.Tensor, gates: torch.Tensor, *factors: torch.Tensor, index: Any = index) -> torch.Tensor:
            return routed_lora(x, *factors, index, index, base=base, scaling=0.5, gates=gates, backend=backend)

        yield from _modes(f"routed_adapter, {kind}", adapter, (x, gates, *banks), backward=2)
        yield from _modes(f"routed_lora, {kind}", lora, (x, gates, *factors), backward=2)


def _loss(backend: str) -> Iterator[Call]:
    logits, labels = _randn(64, 2), torch.zeros(32, dtype=torch.int64)

    def call(logits: torch.Tensor) -> torch.Tensor:
        return adamix_loss(logits, labels, backend=backend).loss

    yield from _modes("adamix_loss 64x2", call, (logits,), backward=1)

    def pair(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
        return consistency_loss(logits_a, logits_b, backend=backend)

    yield from _modes("consistency_loss 32x2", pair, logits.chunk(2), backward=1)


def _merge(backend: str) -> Iterator[Call]:
    banks = [_randn(EXPERTS, RANK, HIDDEN) for _ in range(96)]
    yield "merge_experts", lambda: merge_experts(banks[0], backend=backend), 1, 1
    yield "merge_banks, 96 banks", lambda: merge_banks(banks, [None] * len(banks), backend=backend), 1, 1


class _Nothing(torch.autograd.Function):
    """What PyTorch alone takes for a Function of an adapter's tensors: new memory for the output and each gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *banks: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *banks)
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.new_empty(t.shape) for t in ctx.saved_tensors)


def _floor() -> Iterator[Call]:
    x = _randn(BATCH, TOKENS, HIDDEN)
    banks = _randn(EXPERTS, RANK, HIDDEN), _randn(EXPERTS, RANK), _randn(1, HIDDEN, RANK), _randn(1, HIDDEN)
    leaves = [t.requires_grad_() for t in (x, *banks)]
    gradient = torch.ones_like(x)
    yield "a Function of routed_adapter's tensors, forward with grad", functools.partial(_Nothing.apply, *leaves), 0, 0
    both = functools.partial(_both, _Nothing.apply, leaves, gradient)
    yield "a Function of routed_adapter's tensors, forward + backward", both, 0, 0


def _modes(
    name: str, forward: Callable[..., torch.Tensor], arguments: Sequence[torch.Tensor], backward: int
) -> Iterator[Call]:
    """The forward alone, the forward that autograd records, and that with its backward of every argument."""
    leaves = [t.clone().requires_grad_() for t in arguments]
    gradient = torch.ones_like(forward(*arguments))
    yield f"{name}, forward", functools.partial(forward, *arguments), 1, 2
    yield f"{name}, forward with grad", functools.partial(forward, *leaves), 1, 2
    both = functools.partial(_both, forward, leaves, gradient)
    yield f"{name}, forward + backward", both, 1 + backward, 2 + backward


def _both(forward: Callable[..., torch.Tensor], leaves: Sequence[torch.Tensor], gradient: torch.Tensor) -> None:
    torch.autograd.grad(forward(*leaves), leaves, gradient)


def _randn(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=DTYPE)
