"""C++/CUDA backend of routed LoRA: csrc/routed_lora. One launch forward, at most three backward."""

from __future__ import annotations

from typing import Any

import torch

from ..._extension import routed_most as most
from ..._extension import unsupported
from .._direct import Kept, traits
from .._passes import by_pass, fold_passes
from .signatures import Forward

__all__ = ["backward", "direct", "forward", "most", "unsupported"]

_ops = torch.ops.adamix_cuda


def forward(*arguments: Any, inplace: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    base = Forward(*arguments).base
    if inplace and base is not None:
        return base, _ops.routed_lora_forward_(*arguments)
    return _ops.routed_lora_forward(*arguments)


def backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _ops.routed_lora_backward(*arguments)


class _Direct:
    """Every call, as the library checks what it is given; in place only what api.py has checked before.

    An error after base was overwritten must not lead to a second attempt.
    """

    has_node = True

    def __init__(self) -> None:
        self._inplace: Kept[bool] = Kept()

    def find(self, inplace: bool, *arguments: Any) -> Any:
        *options, passes = arguments[7:]
        if not inplace:
            if passes:
                return lambda *tensors: _forward_by_pass(*tensors, *options, passes)
            return lambda *tensors: _ops.routed_lora_forward.default(*tensors, *options)
        if not self._inplace.get(_key(arguments)):
            return None

        def over(*tensors: Any) -> tuple[torch.Tensor]:
            x, a, b, a_index, b_index, base, seed = tensors
            rows, target = fold_passes(x, passes), fold_passes(base, passes)
            return (_ops.routed_lora_forward_.default(rows, a, b, a_index, b_index, target, seed, *options),)

        return over

    def make(self, inplace: bool, *arguments: Any) -> Any:
        if inplace:
            self._inplace.keep(_key(arguments), True)
        return self.find(inplace, *arguments)

    def backward(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        if arguments[-1]:
            return _backward_by_pass(*arguments)
        grads: tuple[torch.Tensor, ...] = _ops.routed_lora_backward.default(*arguments[:-1])
        return grads


def _key(arguments: tuple[Any, ...]) -> Any:
    return arguments[7:], *map(traits, arguments[:7])


_forward_by_pass, _backward_by_pass = by_pass(forward, 0, 5), by_pass(backward, 0, 1, 2)
direct = _Direct()
