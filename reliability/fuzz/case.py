"""One random call, forward and backward, and everything that must hold for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from adamix_kernels.testing import error_and_budget, error_in_budget, poisoned_memory

Tensors = Sequence[torch.Tensor]
# Law 6: at most twice PyTorch's own error. Among few numbers one rounding is luck, so where a result misses that, its
# own error is the largest over so many roundings of the same inputs.
MULTIPLE, ROUNDINGS = 2.0, 24


@dataclass
class Case:
    """A call with everything drawn.

    tensors: the floating inputs, None for one that is absent; each gets a gradient.
    op(backend, *tensors): the outputs, the first one differentiable.
    plain(*tensors): the same by definition, in PyTorch, in the tensors' dtype; `wide` when the op's maths is float32
        (float64 for float64) whatever the dtype.
    jittered(generator, *tensors): plain with what lies between its steps off by one rounding; for an op where that
        matters and the inputs' own rounding does not reach it.
    incoming: the gradient of the first output, None for an op without a derivative.
    unused: (position among the tensors, experts of that bank that no row takes), whose gradient is exactly zero.
    summed_together: positions of banks routed by token. The reference sums their gradients over all tokens, with zeros
        for the others', so a token's infinity reaches every expert that is used.
    said: all that was drawn, in words.
    """

    name: str
    tensors: tuple[torch.Tensor | None, ...]
    op: Callable[..., Tensors]
    plain: Callable[..., Tensors]
    incoming: torch.Tensor | None
    said: list[str]
    wide: bool = False
    jittered: Callable[..., Tensors] | None = None
    integers: tuple[torch.Tensor, ...] = ()
    unused: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    summed_together: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"{self.name}: " + "; ".join(self.said)


def results(case: Case, backend: str) -> list[torch.Tensor]:
    """The outputs of a case on a backend, then the gradient of every tensor; unwritten memory holds NaN."""
    with poisoned_memory():
        return _results(lambda *given: case.op(backend, *given), case.tensors, case.incoming, strict=True)


def judge(case: Case, got: Tensors, backend: str) -> float:
    """The largest share of its error budget that one of `results` takes. Raises AssertionError where it is above 1, or
    a shape, a dtype, an infinity or the gradient of an unused expert is not what it should be."""
    outputs = len(got) - sum(t is not None for t in case.tensors)
    present = [n for n, t in enumerate(case.tensors) if t is not None]
    spread = {outputs + present.index(n) for n in case.summed_together} if backend == "reference" else set()
    _check_unused(case, got)
    return _compare(case, got, spread)


def check(case: Case, backend: str, twice: bool = True) -> None:
    """Raises AssertionError with what does not hold.

    Every output and gradient has its shape and dtype, lies within the error budget, is not finite where the definition
    is not and finite where PyTorch's is, and (twice) has the same bits a second time, when memory is fresh as well as
    when it holds NaN; no input is written.
    """
    before = [bits(t) for t in (*case.tensors, *case.integers) if t is not None]
    op = lambda *given: case.op(backend, *given)  # noqa: E731
    got = results(case, backend)
    again = _results(op, case.tensors, case.incoming, strict=True) if twice else got
    for number, (first, second) in enumerate(zip(got, again, strict=True)):
        assert torch.equal(bits(first), bits(second)), f"{case}: result {number} has other bits the second time"
    for number, t in enumerate(t for t in (*case.tensors, *case.integers) if t is not None):
        assert torch.equal(before[number], bits(t)), f"{case}: input {number} was written"
    judge(case, got, backend)


def _compare(case: Case, got: Tensors, spread: set[int]) -> float:
    """The largest share of a budget. spread: the results that may be NaN where the definition is not."""
    largest = 0.0
    exact = _results(case.plain, [_as(t, torch.float64) for t in case.tensors], _as(case.incoming, torch.float64))
    own = _rounded_definition(case, case.plain, case.tensors, case.incoming, got)
    assert len(got) == len(exact)
    roundings: list[list[torch.Tensor]] = []
    for number, (result, want, mine) in enumerate(zip(got, exact, own, strict=True)):
        assert result.shape == want.shape, f"{case}: result {number} is {tuple(result.shape)}, not {tuple(want.shape)}"
        assert result.dtype == mine.dtype, f"{case}: result {number} is {result.dtype}, not {mine.dtype}"
        shown = ~result.isfinite() | want.isfinite() | mine.isfinite()
        assert shown.all(), f"{case}: result {number} is finite where its definition is not"
        sound = want.isfinite() & mine.isfinite()
        if number in spread:
            sound &= result.isfinite()
        if not sound.any():
            continue
        result, want, mine = result[sound], want[sound], mine[sound]
        assert result.isfinite().all(), f"{case}: result {number} is not finite where PyTorch's is"
        fits, figures = error_in_budget(result, want, mine, MULTIPLE)
        if not fits:
            roundings = roundings or [
                _rounded_definition(case, *_wiggled(case, seed), got) for seed in range(ROUNDINGS)
            ]
            other = torch.stack([mine, *(values[number][sound] for values in roundings)])
            mine = torch.where(other.isfinite(), other, mine)
            fits, figures = error_in_budget(result, want, mine, MULTIPLE)
        assert fits, f"{case}: result {number}: {figures}"
        largest = max(largest, _share(result, want, mine))
    return largest


def _share(result: torch.Tensor, want: torch.Tensor, mine: torch.Tensor) -> float:
    """The error of a result, in its budget."""
    error, _, budget = error_and_budget(result, want, mine, MULTIPLE)
    return error / budget if budget else 0.0


def _check_unused(case: Case, got: Tensors) -> None:
    if not case.unused:
        return
    gradients = iter(got[len(got) - sum(t is not None for t in case.tensors) :])
    by_position = {n: next(gradients) for n, t in enumerate(case.tensors) if t is not None}
    for position, experts in case.unused:
        gradient = by_position[position][experts]
        assert gradient.eq(0).all(), f"{case}: an expert without rows got a gradient (tensor {position})"


def _results(function, tensors, incoming, strict=False) -> list[torch.Tensor]:
    """The outputs, then the gradient of every tensor."""
    if incoming is None:
        return list(function(*tensors))
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    present = [t for t in leaves if t is not None]
    if not outputs[0].requires_grad:
        gradients = [torch.zeros_like(t) for t in present]
        assert not strict, "no gradient was recorded"
    else:
        gradients = torch.autograd.grad(outputs[0], present, incoming, materialize_grads=not strict)
    return [t.detach() for t in outputs] + list(gradients)


def _rounded_definition(case: Case, plain, tensors, incoming, like: Tensors) -> list[torch.Tensor]:
    """The definition in PyTorch, in the dtype the op computes in, rounded to the dtypes of the results."""
    if case.wide:
        tensors, incoming = [_as(t, _wide(case)) for t in tensors], _as(incoming, _wide(case))
    return [value.to(t.dtype) for value, t in zip(_results(plain, tensors, incoming), like, strict=True)]


def _wiggled(case: Case, seed: int):
    """(the definition, the inputs, the incoming gradient), each tensor off by one rounding of the dtype that is
    computed in, up or down."""
    generator = torch.Generator().manual_seed(seed)
    moved = []
    for t in (*case.tensors, case.incoming):
        if t is not None:
            dtype = _wide(case) if case.wide else t.dtype
            sign = torch.randint(-1, 2, t.shape, generator=generator).double()
            t = (t.double() * (1 + torch.finfo(dtype).eps * sign)).to(dtype)
        moved.append(t)
    plain = case.plain if case.jittered is None else lambda *given: case.jittered(generator, *given)
    return plain, moved[:-1], moved[-1]


def _wide(case: Case) -> torch.dtype:
    present = [t for t in case.tensors if t is not None]
    return torch.float64 if any(t.dtype == torch.float64 for t in present) else torch.float32


def _as(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if t is None else t.to(dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    """A contiguous copy to compare with torch.equal, NaN included."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    t = t.detach().clone(memory_format=torch.contiguous_format)
    return t.view(kinds[t.element_size()]) if t.is_floating_point() else t
