"""C++/CUDA backend of the consistency losses: csrc/consistency.

Launches: forward one, with the gradient where one is wanted, and one that adds up the blocks' sums where there is more
than one block, as there is for all but few rows; a third where so many rows count that not every block can number
them. Backward one, whose blocks return at once where the gradient comes in that the forward expected.
linear_adamix_loss: as many a chunk as a forward, and the gradient over the chunk's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..._extension import unsupported
from ._chunks import Chunk, linear_loss
from .signatures import AdaMixBackward, ConsistencyBackward, Linear, split

__all__ = [
    "adamix_backward", "adamix_forward", "adamix_forward_grad", "backward", "direct", "forward",
    "forward_grad", "linear_forward", "rescale", "unsupported", "writes_gradient",
]  # fmt: skip

_ops = torch.ops.adamix_cuda


def writes_gradient(device_type: str, dtype: torch.dtype, expected: float | None) -> bool:
    """float16 waits for its loss scale, unless told of it."""
    return dtype != torch.float16 or expected is not None


def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _ops.consistency_forward(*arguments, 1.0, None, None)


def forward_grad(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _ops.consistency_forward(*arguments)


def backward(*arguments: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    a, out, expected = split(ConsistencyBackward, arguments)
    out = (a.logits_a.new_empty(a.logits_a.shape), a.logits_b.new_empty(a.logits_b.shape)) if out is None else out
    _ops.consistency_backward(*a, *out, expected)
    return out


def adamix_forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return _ops.adamix_forward(*arguments, 1.0, None)


def adamix_forward_grad(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return _ops.adamix_forward(*arguments)


def adamix_backward(*arguments: Any) -> torch.Tensor:
    a, out, expected = split(AdaMixBackward, arguments)
    out = a.logits.new_empty(a.logits.shape) if out is None else out
    _ops.adamix_backward(*a, out, expected)
    return out


def rescale(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    _ops.consistency_rescale(gradient, factor)


def linear_forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """The reference's chunks; a chunk's logits are overwritten by their gradient."""
    return linear_loss(_chunk, Linear(*arguments))


def _chunk(
    a: Linear, logits: torch.Tensor, labels: torch.Tensor, _counted: Any, selected: Any, factors: Any, need_grad: bool
) -> Chunk:
    options = a.ignore_index, a.label_smoothing, a.detach_target, need_grad
    sums = _ops.adamix_chunk(logits, labels, selected, factors, *options)
    return Chunk(sums[0], sums[1], logits if need_grad else None)


Plan = Callable[..., tuple[torch.Tensor, ...]]


class _AdaMix:
    """Every call: the library checks what it is given."""

    def find(self, *arguments: Any) -> Plan:
        write, options = arguments[4], arguments[5:]
        run = _ops.adamix_forward.default

        def plan(logits: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            if not write:
                return run(logits, *tensors, *options, None)
            out = torch.empty_like(logits, memory_format=torch.contiguous_format)
            return *run(logits, *tensors, *options, out), out

        return plan

    make = find


class _Consistency:
    """As _AdaMix."""

    def find(self, *arguments: Any) -> Plan:
        write_a, write_b, *options = arguments[3:]
        run = _ops.consistency_forward.default

        def plan(logits_a: torch.Tensor, logits_b: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            da, db = _new(logits_a, write_a), _new(logits_b, write_b)
            return *run(logits_a, logits_b, mask, *options, da, db), *(g for g in (da, db) if g is not None)

        return plan

    make = find


def _new(like: torch.Tensor, wanted: bool) -> torch.Tensor | None:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else None


class _Direct:
    writes_gradient = staticmethod(writes_gradient)

    def __init__(self) -> None:
        self.adamix, self.consistency = _AdaMix(), _Consistency()

    def adamix_backward(self, grad: torch.Tensor, *arguments: Any) -> tuple[()]:
        (*tensors, out), options, expected = arguments[:6], arguments[6:10], arguments[10]
        _ops.adamix_backward.default(grad, *tensors, *options, out, expected)
        return ()

    def consistency_backward(self, grad: torch.Tensor, *arguments: Any) -> tuple[()]:
        (*tensors, da, db), detach_target, expected = arguments[:7], arguments[7], arguments[8]
        _ops.consistency_backward.default(grad, *tensors, detach_target, da, db, expected)
        return ()


direct = _Direct()
