"""C++/CUDA backend of the gated adapter: csrc/gated. One launch forward, at most three backward."""

from __future__ import annotations

from typing import Any

import torch

from ..._extension import unsupported
from .._gated_mix import gates_grad
from .signatures import Backward

__all__ = ["backward", "direct", "forward", "unsupported"]

_ops = torch.ops.adamix_cuda


def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _ops.gated_adapter_forward(*arguments)


def backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    a = Backward(*arguments)
    *grads, dgates = _ops.gated_adapter_backward(*arguments)
    return (*grads, gates_grad(dgates, a.gates) if a.need_gates else dgates)


class _Direct:
    """Every call, as the library checks what it is given."""

    def find(self, inplace: bool, *arguments: Any) -> Any:
        options = arguments[9:]
        return lambda *tensors: _ops.gated_adapter_forward.default(*tensors, *options)

    make = find

    def backward(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        return backward(*arguments)


direct = _Direct()
