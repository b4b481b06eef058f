"""The router's dispatcher ops: fakes and backend selection."""

from __future__ import annotations

from types import ModuleType

import torch

from ..._backends import select
from .._library import define
from ._grads import wide_dtype
from .signatures import Backward, Forward


def _forward(a: Forward, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _select(a.x, backend).forward(*a)
    return made


def _forward_fake(a: Forward, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _select(a.x, backend)
    logits = a.x.new_empty(*a.x.shape[:-1], a.weight.shape[0], dtype=wide_dtype(a.x))
    index = (*a.x.shape[:-1], a.top_k) if a.top_k else (0,)
    gates = logits.new_empty(index if a.top_k else logits.shape)
    return gates, logits.new_empty(index, dtype=torch.int64), logits


def _backward(a: Backward, backend: str) -> tuple[torch.Tensor, ...]:
    grads: tuple[torch.Tensor, ...] = _select(a.x, backend).backward(*a)
    return grads


def _backward_fake(a: Backward, backend: str) -> tuple[torch.Tensor, ...]:
    shapes = (a.x, a.x.shape, a.need_x), (a.weight, a.weight.shape, a.need_weight)
    bias = a.weight.new_empty(a.weight.shape[0] if a.need_bias else 0)
    return *(like.new_empty(shape if needed else 0) for like, shape, needed in shapes), bias


def _select(x: torch.Tensor, backend: str) -> ModuleType:
    return select("router", backend, x.device, x.dtype, 0)


def by_kernel(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether another backend than the reference serves calls on x of this device and dtype."""
    module = select("router", backend, device, dtype, 0)
    return module.__name__.rpartition(".")[2] != "reference"


# As torch.compiler.assume_constant_result marks it, which would import the whole compiler with this package.
by_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Returns (gates, ids of the chosen, or [0] where dense, logits).
router_op = define("router", Forward, "(Tensor, Tensor, Tensor)", _forward, _forward_fake)
# Returns (dx, d weight, d bias); what is not needed is an empty tensor.
router_backward_op = define("router_backward", Backward, "(Tensor, Tensor, Tensor)", _backward, _backward_fake)
