"""The reference's losses of few classes in eager mode on a CPU, where the calls themselves are what takes the time.

The operations of _cpu.py for the usual options, in their order, so that every bit is the same, and nothing around
them: what a call must be is asked here, and no table of plans holds it. Every other call takes another way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from ... import _auto
from .. import _checks
from .._direct import applied, below_autograd
from .._library import once_differentiable
from . import _blocks, _cpu
from .signatures import AdaMixBackward, ConsistencyBackward

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_WIDE = frozenset((torch.float32, torch.float64))
_INDICES = frozenset(_checks.INDEX_DTYPES)
_Gradients = tuple[torch.Tensor, ...]


def pair(logits_a: Any, logits_b: Any, backend: str, expected: float | None) -> torch.Tensor | None:
    """consistency_loss with constant targets, of all rows, as their mean; None: not served. Where may_be_direct."""
    if not (_served(logits_a, backend, expected) and _fit(logits_b)):
        return None
    shape = logits_a.shape
    if logits_b.dtype is not logits_a.dtype or logits_b.shape != shape:
        return None
    mean, incoming = _numbers(shape[:-1].numel(), logits_a.dtype, expected)
    with torch._C._AutoDispatchBelowAutograd():
        log_p, log_q = torch.log_softmax(logits_a, -1), torch.log_softmax(logits_b, -1)
        gap = log_p.exp().sub_(log_q.exp())
        loss = log_p.sub_(log_q).mul_(gap).sum(-1).sum().mul_(0.5 * mean)
        if not math.isfinite(loss.item()):
            return None
        da = gap.mul_(incoming * mean * 0.5)
        grads = da, da.neg()
    attached: torch.Tensor = _attach(loss, grads, _pair_again, (incoming, mean), logits_a, logits_b)
    return attached


def doubled(
    logits: Any, labels: Any, weight: float, ignore_index: int, backend: str, expected: float | None
) -> tuple[torch.Tensor, ...] | None:
    """(loss, cross-entropy, consistency) of adamix_loss with constant targets and labels for all rows, without
    smoothing; None as above."""
    if not _served(logits, backend, expected) or labels.__class__ is not torch.Tensor:
        return None
    if not labels.is_cpu or labels.dtype not in _INDICES or labels.layout is not torch.strided:
        return None
    rows, classes = labels.shape, logits.shape[-1]
    if not rows or logits.shape != (2 * rows[0], *rows[1:], classes):
        return None
    if weight.__class__ is not float or not 0 <= weight < math.inf or ignore_index.__class__ is not int:
        return None
    least, most = labels.aminmax()
    low, high = least.item(), most.item()
    if low < 0 or high >= classes or low <= ignore_index <= high:
        return None
    mean, incoming = _numbers(rows.numel(), logits.dtype, expected)
    with torch._C._AutoDispatchBelowAutograd():
        log_probs = torch.log_softmax(logits, -1)
        d_logits = log_probs.exp()
        (log_p, log_q), (p, q) = log_probs.chunk(2), d_logits.chunk(2)
        target = labels.long().unsqueeze(-1)
        cross_entropy = log_p.gather(-1, target).sum().mul_(-mean)
        gap = p - q
        consistency = log_p.sub_(log_q).mul_(gap).sum(-1).sum().mul_(0.5 * mean)
        loss = torch.add(cross_entropy, consistency, alpha=weight)
        if not math.isfinite(loss.item()):
            return None
        of_entropy = incoming * mean
        torch.neg(gap.mul_(of_entropy * weight * 0.5), out=q)
        torch.add(gap, p, alpha=of_entropy, out=p).scatter_(-1, target, -of_entropy, reduce="add")
    known = incoming, mean, weight, ignore_index
    return _attach(loss, (d_logits,), _doubled_again, known, logits, labels), cross_entropy, consistency


def _served(logits: Any, backend: str, expected: float | None) -> bool:
    """Whether the reference serves these logits, and nothing changes what it does."""
    return (
        _fit(logits)
        and (backend == "reference" or (backend == "auto" and _is_ours(_auto.table)))
        and (expected is None or (expected.__class__ is float and 0 < expected < math.inf))
        and torch.is_grad_enabled()
        and not below_autograd()
    )


def _fit(logits: Any) -> bool:
    return (
        logits.__class__ in _PLAIN
        and logits.requires_grad
        and logits.is_cpu
        and logits.dtype in _WIDE
        and logits.layout is torch.strided
        and logits.is_contiguous()
        and 0 < logits.numel() <= _blocks._CPU
        and logits.dim() > 0
        and logits.shape[-1] < _cpu.MANY
    )


@functools.lru_cache(16)
def _is_ours(table: _auto.Table) -> bool:
    """Whether "auto" is the reference on every CPU."""
    return not any(op == "consistency" and device.type == "cpu" for op, device, *_ in table.choices)


@functools.lru_cache(4096)
def _numbers(rows: int, dtype: torch.dtype, expected: float | None) -> tuple[float, float]:
    """(one over the rows, the incoming gradient that is expected), as the dtype holds them."""
    return _cpu.as_stored(1 / rows, dtype), _cpu.as_stored(expected or 1.0, dtype)


class _Attached(torch.autograd.Function):
    """A loss whose gradients are at hand for the incoming one that stands first in `known`; for another, and in a later
    backward through a retained graph, again(grad, tensors, known, where they go) writes them."""

    @staticmethod
    def forward(ctx: Any, made: tuple[torch.Tensor, _Gradients], again: Any, known: Any, *tensors: torch.Tensor) -> Any:
        loss, ctx.grads = made
        ctx.again, ctx.known = again, known
        ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, grads = ctx.saved_tensors, ctx.grads
        ctx.grads = None
        if grads is None or grad.item() != ctx.known[0]:
            grads = ctx.again(grad, saved, ctx.known, grads)
        return None, None, None, *grads, *(None,) * (len(saved) - len(grads))


_apply = applied(_Attached)


def _attach(
    loss: torch.Tensor, grads: _Gradients, again: Callable[..., _Gradients], known: Any, *tensors: torch.Tensor
) -> torch.Tensor:
    attached: torch.Tensor = _apply((loss, grads), again, known, *tensors)
    return attached


def _pair_again(grad: torch.Tensor, saved: Any, known: Any, to: _Gradients | None) -> _Gradients:
    logits_a, logits_b = saved
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        da, db = (torch.empty_like(logits_a), torch.empty_like(logits_b)) if to is None else to
        scale = grad.new_full((), known[1])
        _cpu.consistency_again(ConsistencyBackward(grad, logits_a, logits_b, None, scale, scale, True), (da, db))
        return da, db


def _doubled_again(grad: torch.Tensor, saved: Any, known: Any, to: _Gradients | None) -> _Gradients:
    logits, labels = saved
    _, mean, weight, ignore_index = known
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        (d_logits,) = (torch.empty_like(logits),) if to is None else to
        scales = grad.new_full((2,), mean)
        a = AdaMixBackward(grad, logits, labels, None, scales, scales, weight, ignore_index, 0.0, True)
        _cpu.adamix_again(a, d_logits)
        return (d_logits,)
