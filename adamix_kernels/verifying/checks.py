"""One case on one backend: what is wrong with it, in words, or None."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .case import Case
from .guards import Guards

# A result may err so many times as what plain PyTorch errs in the same dtype, or what rounding errs if that is more.
# The largest error of fewer than FEW numbers is luck: it may be nothing.
MULTIPLE, FEW, MULTIPLE_OF_FEW = 4.0, 256, 32.0
# Errors that all point one way, as of a wrong factor, must cancel like roundings; products may be three of TF32.
MULTIPLE_OF_FACTOR, LEAST_FACTOR = 8.0, 2.0**-21
_TF32_EPS = 2.0**-10

Results = list[torch.Tensor]


class Check:
    """Check(case, device, dtype, seed).problem(backend)."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, seed: int, tf32: bool = False):
        self.case, self.device, self.dtype = case, device, dtype
        self.eps = _TF32_EPS if tf32 else torch.finfo(dtype).eps
        generator = torch.Generator().manual_seed(seed)
        values = [None if s is None else _draw(s, n, case, generator).to(dtype) for n, s in enumerate(case.leaves)]
        self._extra = [t.to(device) if isinstance(t, torch.Tensor) else t for t in case.extra(generator)]
        self._values = [t if t is None else t.to(device) for t in values]
        wide = [t if t is None else t.double() for t in self._values]
        self._grad = None
        with torch.no_grad():
            shape = _first(case.call("reference", wide, self._extra)).shape
        if shape:
            self._grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        self.exact = self._run("reference", wide)
        self.own = self._run("reference", self._values)

    def problem(self, backend: str) -> str | None:
        """Runs the case twice, on a GPU also from a CUDA graph."""
        with Guards(self.device.type) as guards:
            leaves = [t if t is None else self._placed(t, guards) for t in self._values]
            before = [t if t is None else t.clone() for t in leaves]
            found = self._run(backend, leaves)
            again = self._run(backend, leaves)
        wrong = guards.broken() or self._changed(leaves, before)
        if wrong is None:
            wrong = next(filter(None, map(self._differs, range(len(found)), found)), None)
        if wrong is None and not _same_bits(found, again):
            wrong = "gave other bits when called again"
        if wrong is None and self.device.type == "cuda":
            guards.forget()
            kept = [t for t in (self._grad, *leaves) if t is not None]
            replayed = replay(lambda: self._run(backend, leaves), kept)
            if not _same_bits(found, replayed):
                wrong = "gave other bits when replayed from a CUDA graph"
        return wrong

    def call(self, backend: str) -> Callable[[], Results]:
        """The case on memory of its own, to be timed."""
        leaves = [t if t is None else t.clone() for t in self._values]
        return lambda: self._run(backend, leaves)

    def _placed(self, t: torch.Tensor, guards: Guards) -> torch.Tensor:
        """A copy between guard bands, as the case wants it to lie."""
        shape = list(t.shape)
        if "strided" in self.case.placed and t.dim() > 1:
            # Every other row, of a tensor whose last axis is the one before last.
            shape = [shape[0] * 2, *shape[1:-2], *(shape[:-3:-1] if t.dim() > 2 else shape[1:])]
            made = guards.new(shape, t.dtype, t.device)[::2]
            made = made.transpose(-1, -2) if t.dim() > 2 else made
        else:
            made = guards.new(shape, t.dtype, t.device, 1 if "misaligned" in self.case.placed else 0)
        return made.copy_(t)

    def _run(self, backend: str, leaves: Sequence[torch.Tensor | None]) -> Results:
        """The output, what comes with it, and every gradient."""
        given = [t if t is None else t.detach().requires_grad_() for t in leaves]
        out = self.case.call(backend, given, self._extra)
        first = _first(out)
        wanted = [t for t in given if t is not None]
        grad = None if self._grad is None else self._grad.to(first.dtype)
        grads = torch.autograd.grad(first, wanted, grad, allow_unused=True)
        parts = [out] if isinstance(out, torch.Tensor) else list(out)
        return [t.detach() for t in (*parts, *grads) if t is not None]

    def _changed(self, leaves: Sequence[torch.Tensor | None], before: Sequence[torch.Tensor | None]) -> str | None:
        for number, (now, then) in enumerate(zip(leaves, before)):
            if now is not None and then is not None and not torch.equal(now, then):
                return f"changed its argument {number}"
        return None

    def _differs(self, number: int, found: torch.Tensor) -> str | None:
        if number >= len(self.exact):
            return f"gave {number + 1} results or more, expected {len(self.exact)}"
        want, own = self.exact[number], self.own[number]
        what = f"result {number}"
        if found.shape != want.shape or found.dtype != own.dtype:
            return f"{what}: got {found.dtype}{list(found.shape)}, expected {own.dtype}{list(want.shape)}"
        if not want.numel():
            return None
        if not torch.isfinite(found).all():
            return f"{what}: {int((~torch.isfinite(found)).sum())} of {found.numel()} numbers are not finite"
        if want.dim() > 1 and bool((found[(want == 0).flatten(1).all(1)] != 0).any()):
            return f"{what}: a gradient that must be exactly zero (of an expert, a row) is not"
        return self._errs(what, found.double() - want, own.double() - want, want)

    def _errs(self, what: str, error: torch.Tensor, own: torch.Tensor, want: torch.Tensor) -> str | None:
        few = want.numel() < FEW
        multiple = MULTIPLE_OF_FEW if few else MULTIPLE
        measures: list[tuple[str, Callable[[torch.Tensor], float], float]] = [
            ("errs by", lambda t: t.abs().max().item(), self.eps),
        ]
        if not few:
            measures.append(("errs on average by", lambda t: t.square().mean().sqrt().item(), self.eps / 4))
        for words, size, rounding in measures:
            allowed = multiple * max(size(own), rounding * size(want))
            if size(error) > allowed:
                return f"{what}: {words} {size(error):.3e}, PyTorch's own {size(own):.3e}, allowed {allowed:.3e}"
        length = want.square().sum().item()
        if few or not length:
            return None
        factor, mine = ((t * want).sum().item() / length for t in (error, own))
        allowed = MULTIPLE_OF_FACTOR * max(abs(mine), self.eps / math.sqrt(want.numel()), LEAST_FACTOR)
        if abs(factor) > allowed:
            return f"{what}: too large by a factor of 1 {factor:+.2e}, allowed {allowed:.1e}"
        return None


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """float32 products on TF32 units, or not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = on
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def _draw(shape: tuple[int, ...], number: int, case: Case, generator: torch.Generator) -> torch.Tensor:
    scale = case.scale if number == 0 else 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 1.0
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def _first(out: Any) -> torch.Tensor:
    first: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
    return first


def _same_bits(one: Results, other: Results) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(_bytes(a), _bytes(b)) for a, b in zip(one, other)
    )


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def replay(run: Callable[[], Results], inputs: Sequence[torch.Tensor]) -> Results:
    """What `run` gives from a CUDA graph, replayed after its results were overwritten; not those in inputs' memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    given = {t.untyped_storage().data_ptr() for t in inputs}
    for t in results:
        if t.untyped_storage().data_ptr() not in given and t.is_contiguous():
            t.fill_(0)
    graph.replay()
    torch.cuda.synchronize()
    return results
