"""C++/CUDA backend of gated LoRA: csrc/gated. One launch forward, at most three backward."""

from __future__ import annotations

from typing import Any

import torch

from ..._extension import grouped_most as most
from ..._extension import unsupported
from .._direct import Kept, traits
from .._gated_mix import gates_grad
from .signatures import Backward, Forward

__all__ = ["backward", "direct", "forward", "most", "unsupported"]

_ops = torch.ops.adamix_cuda


def forward(*arguments: Any, inplace: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    base = Forward(*arguments).base
    if inplace and base is not None:
        return base, _ops.gated_lora_forward_(*arguments)
    return _ops.gated_lora_forward(*arguments)


def backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    a = Backward(*arguments)
    *grads, dgates = _ops.gated_lora_backward(*arguments)
    return (*grads, gates_grad(dgates, a.gates) if a.need_gates else dgates)


class _Direct:
    """Every call, as the library checks what it is given; in place only what api.py has checked before.

    An error after base was overwritten must not lead to a second attempt.
    """

    def __init__(self) -> None:
        self._inplace: Kept[bool] = Kept()

    def find(self, inplace: bool, *arguments: Any) -> Any:
        options = arguments[9:]
        if not inplace:
            return lambda *tensors: _ops.gated_lora_forward.default(*tensors, *options)
        if not self._inplace.get(_key(arguments)):
            return None
        return lambda *tensors: (_ops.gated_lora_forward_.default(*tensors, *options),)

    def make(self, inplace: bool, *arguments: Any) -> Any:
        if inplace:
            self._inplace.keep(_key(arguments), True)
        return self.find(inplace, *arguments)

    def backward(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        return backward(*arguments)


def _key(arguments: tuple[Any, ...]) -> Any:
    return arguments[9:], *map(traits, arguments[:9])


direct = _Direct()
