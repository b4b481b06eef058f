"""No op is timed that disagrees with float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..measure.ledger import RefusedError
from .cases import Bound, Case, Contender, Draw, Inputs, tensors

# A result may err this many times what the formula errs in the same dtype, or what rounding errs if that is more.
MULTIPLE = 4.0
# A peer computes the same formula, but may add up as it likes: compiled for the CPU, sums run from first to last.
MULTIPLE_OF_PEERS = 32.0
# One number's own error is luck: it may be nothing. Results of fewer numbers are allowed this many times more.
FEW, SLACK_OF_FEW = 64, 8.0


def require_agreement(
    case: Case, contender: Contender, binder: Callable[[Inputs], Bound], device: torch.device, both_ways: bool
) -> float:
    """The largest error of output and gradients against float64, in units of what the formula errs in the same dtype.

    binder: the opened `contender`. both_ways: compare gradients too. Raises RefusedError for more than allowed.
    """
    inputs = (case.make_check or case.make)(Draw(device, case.dtype, seed=1))
    if contender.narrow is not None:
        inputs = contender.narrow(inputs)
    plain = contender.plain or case.plain
    exact = _results(*_plain(plain, inputs.cast(torch.float64)), inputs.grad, both_ways)
    own = _results(*_plain(plain, inputs.cast(case.dtype)), inputs.grad, both_ways)
    bound = binder(_requiring_grad(inputs, both_ways))
    found = _results(bound.call, bound.leaves, inputs.grad, both_ways)
    if len(found) != len(exact):
        raise RefusedError(f"gave {len(found)} tensors, the formula gives {len(exact)}")
    multiple, largest = MULTIPLE if contender.exacting else MULTIPLE_OF_PEERS, 0.0
    for number, (result, truth, same) in enumerate(zip(found, exact, own, strict=True)):
        problem = disagreement(result, truth, same, multiple)
        if problem is not None:
            raise RefusedError(f"result {number} of {len(found)}: {problem}")
        error, unit = _error(result, truth), _unit(result, truth, same)
        largest = max(largest, error / unit if unit else 0.0)
    return largest


def disagreement(
    result: torch.Tensor, exact: torch.Tensor, own: torch.Tensor, multiple: float = MULTIPLE
) -> str | None:
    """What is wrong with `result`, or None: max|result - exact| <= multiple max(max|own - exact|, eps max|exact|)."""
    if result.shape != exact.shape:
        return f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    error = _error(result, exact)
    allowed = multiple * (SLACK_OF_FEW if exact.numel() < FEW else 1.0) * _unit(result, exact, own)
    return None if error <= allowed else f"errs by {error:.3e} against float64, allowed {allowed:.3e}"


def gradients(
    bound: Bound, grad: torch.Tensor | None, out: object, *, retain: bool = False
) -> tuple[torch.Tensor, ...]:
    """The gradients of a bound call's output by its leaves."""
    (value,) = tensors(out)
    return torch.autograd.grad(value, list(bound.leaves), grad, retain_graph=retain)


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return (result.double() - exact).abs().max().item() if exact.numel() else 0.0


def _unit(result: torch.Tensor, exact: torch.Tensor, own: torch.Tensor) -> float:
    if not exact.numel():
        return 0.0
    return max(_error(own, exact), torch.finfo(result.dtype).eps * exact.abs().max().item())


def _plain(plain: Callable, inputs: Inputs) -> tuple[Callable[[], object], tuple[torch.Tensor, ...]]:
    leaves = tuple(t.clone().requires_grad_() for t in inputs.leaves)
    return lambda: plain(*leaves, *inputs.extra), leaves


def _requiring_grad(inputs: Inputs, wanted: bool) -> Inputs:
    return Inputs(tuple(t.requires_grad_(wanted) for t in inputs.leaves), inputs.extra, inputs.grad)


def _results(call: Callable, leaves, grad: torch.Tensor | None, both_ways: bool) -> tuple[torch.Tensor, ...]:
    if not both_ways:
        with torch.no_grad():
            return tensors(call())
    out = call()
    matching = None if grad is None else grad.to(tensors(out)[0].dtype)
    return tuple(t.detach() for t in tensors(out)) + gradients(Bound(call, leaves), matching, out)
