"""Errors of every op on one backend, and the unit they are counted in.

`python -m reliability.numerics.measure BACKEND SIZE` prints `of_backend` as JSON: the processes of
`reliability.numerics` in which the Triton kernels are interpreted, or the CUDA kernels run on the CPU.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .cases import Case, Tensors, cases

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALES = tuple(10.0**decade for decade in range(-6, 5))
_SMALL_SCALES = (1e-3, 1e3)


# A draw costs the interpreter hundreds of times what it costs the reference. The unit is PyTorch's worst of more draws,
# so that it does not hang on luck.
DRAWS = {"reference": 16, "triton": 1, "cuda": 2}
UNIT_DRAWS = {"full": 64, "small": 16}


@dataclass(frozen=True)
class Worst:
    """The largest ratio of one op, backend, direction and dtype, and where it was."""

    op: str
    backend: str
    direction: str
    dtype: str
    ratio: float
    scale: float
    where: str


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """max |result - exact| / max |exact|; infinite where one that is not finite stands for one that is."""
    if not result.isfinite().all():
        return math.inf
    largest = exact.abs().max().item()
    error = (result.double() - exact).abs().max().item()
    return error / largest if largest else (math.inf if error else 0.0)


def rounding(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """What rounding alone may cost a tensor in `dtype`, in relative_error's measure: half a spacing at its largest."""
    kind, largest = torch.finfo(dtype), exact.abs().max().item()
    return max(kind.eps / 2, kind.smallest_normal * kind.eps / 2 / largest if largest else 0.0)


def outcomes(case: Case, function, tensors, incoming: torch.Tensor | None) -> list[torch.Tensor]:
    """The outputs of function(*tensors), then the gradients of its first output."""
    tensors = [t.detach().clone().requires_grad_(name is not None) for t, name in zip(tensors, case.leaves)]
    outputs = function(*tensors)
    first = outputs[0]
    grad = torch.full_like(first, case.loss_scale) if incoming is None else incoming.to(first.dtype)
    wanted = [t for t, name in zip(tensors, case.leaves) if name is not None]
    return [t.detach() for t in (*outputs, *torch.autograd.grad(first, wanted, grad))]


def errors(case: Case, function: Callable, dtype: torch.dtype, scale: float, draws: int) -> list[float]:
    """The worst relative error of every output, then of every gradient, over the first draws at a scale.

    function(dtype, *tensors): the outputs under test; the tensors are as drawn in dtype.
    """
    worst = [0.0] * len(case.names)
    for seed in range(draws):
        tensors, incoming = drawn(case, scale, dtype, seed)
        exact = outcomes(case, lambda *t: case.definition(True, *t), [t.double() for t in tensors], incoming)
        got = outcomes(case, function, tensors, incoming)
        worst = [max(w, relative_error(*pair)) for w, pair in zip(worst, zip(got, exact, strict=True), strict=True)]
    return worst


def units(case: Case, dtype: torch.dtype, scale: float, draws: int) -> list[float]:
    """What `errors` are counted in: PyTorch's own worst error, or what rounding alone may cost, whichever is more.

    For 16-bit inputs PyTorch's error is that of the formula in the same dtype or in float32, whichever is more: where
    p and q round to the same numbers the first is an exact zero, right by underflow.
    """
    unit = [0.0] * len(case.names)
    for seed in range(draws):
        tensors, incoming = drawn(case, scale, dtype, seed)
        exact = outcomes(case, lambda *t: case.definition(True, *t), [t.double() for t in tensors], incoming)
        unit = [max(u, rounding(truth, dtype)) for u, truth in zip(unit, exact, strict=True)]
        for own in {dtype, torch.float32}:
            same = outcomes(case, lambda *t: case.definition(False, *t), [t.to(own) for t in tensors], incoming)
            unit = [max(u, relative_error(*pair)) for u, pair in zip(unit, zip(same, exact, strict=True), strict=True)]
    return unit


def drawn(case: Case, scale: float, dtype: torch.dtype, seed: int) -> tuple[Tensors, torch.Tensor | None]:
    """The tensors of one draw, and the gradient that comes in."""
    generator = torch.Generator().manual_seed(seed)
    tensors = case.draw(scale, dtype, generator)
    if case.incoming is None:
        return tensors, None
    shape = case.definition(False, *tensors)[0].shape
    return tensors, (torch.randn(shape, generator=generator, dtype=torch.float64) * case.incoming).to(dtype)


def grid(size: str) -> Iterator[tuple[Case, torch.dtype, float]]:
    """Every case, dtype and scale of a size."""
    for case in cases():
        for dtype in DTYPES if size == "full" else DTYPES[::2]:
            for scale in SCALES if size == "full" else _SMALL_SCALES:
                yield case, dtype, scale


def of_backend(backend: str, size: str) -> list[list[float] | None]:
    """`errors` along the grid; None where the backend does not serve the case."""
    draws = DRAWS[backend] if size == "full" else 2
    return [
        errors(case, functools.partial(case.op, backend), dtype, scale, draws) if case.served_by(backend) else None
        for case, dtype, scale in grid(size)
    ]


def worst(found: dict[str, list[list[float] | None]], size: str) -> list[Worst]:
    """The largest ratio for each op, backend, direction and dtype; found: backend -> `of_backend`."""
    largest: dict[tuple, Worst] = {}
    for n, (case, dtype, scale) in enumerate(grid(size)):
        unit = units(case, dtype, scale, UNIT_DRAWS[size])
        for backend, all_of in found.items():
            for (direction, name), error, own in zip(case.names, all_of[n] or [], unit, strict=all_of[n] is not None):
                key = case.op_name, backend, direction, str(dtype).removeprefix("torch.")
                one = Worst(*key, _ratio(error, own), scale, f"{name}, {case.variant}")
                largest[key] = max(one, largest.get(key, one), key=lambda w: w.ratio)
    return list(largest.values())


def _ratio(error: float, unit: float) -> float:
    if math.isinf(unit):
        # PyTorch overflows here and has no error to compare with.
        return 0.0 if math.isfinite(error) else 1.0
    return error / unit


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    print(json.dumps(of_backend(*arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
