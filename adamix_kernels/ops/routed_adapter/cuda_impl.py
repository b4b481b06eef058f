"""C++/CUDA backend of the routed adapter: csrc/routed_adapter. One launch forward, two or three backward.

16-bit rows that begin at multiples of 16 bytes may be added up in another order than the same rows elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch

from ..._extension import routed_most as most
from ..._extension import unsupported
from .._passes import by_pass

__all__ = ["backward", "direct", "forward", "most", "unsupported"]

_ops = torch.ops.adamix_cuda


def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _ops.routed_adapter_forward(*arguments)


def backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _ops.routed_adapter_backward(*arguments)


class _Direct:
    """Every call: the library checks what it is given."""

    has_node = True

    def find(self, *arguments: Any) -> Any:
        options = arguments[8:]
        if options[-1]:
            return lambda *tensors: _forward_by_pass(*tensors, *options)
        options = options[:-1]
        return lambda *tensors: _ops.routed_adapter_forward.default(*tensors, *options)

    make = find

    def backward(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        if arguments[-1]:
            return _backward_by_pass(*arguments)
        grads: tuple[torch.Tensor, ...] = _ops.routed_adapter_backward.default(*arguments[:-1])
        return grads


_forward_by_pass, _backward_by_pass = by_pass(forward, 0, 7), by_pass(backward, 0, 1, 2)


direct = _Direct()
