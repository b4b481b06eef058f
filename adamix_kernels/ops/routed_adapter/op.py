"""The routed adapter's dispatcher ops: fakes and backend selection."""

from __future__ import annotations

from types import ModuleType

import torch

from ..._backends import select
from .._adapter_arguments import like_bank
from .._checks import check_index_values
from .._library import define
from .signatures import Backward, Forward


def _served(a: Forward | Backward, backend: str) -> ModuleType:
    narrow = a.down_weight.shape[0] * a.down_weight.shape[1]
    return select("routed_adapter", backend, a.x.device, a.x.dtype, narrow)


def _forward(a: Forward, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    check_index_values("down_index", a.down_index, a.down_weight.shape[0])
    check_index_values("up_index", a.up_index, a.up_weight.shape[0])
    out: tuple[torch.Tensor, torch.Tensor] = _served(a, backend).forward(*a)
    return out


def _forward_fake(a: Forward, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    select("routed_adapter", backend, a.x.device, a.x.dtype)
    out, pre = (a.x.new_empty(*a.x.shape[:2], width) for width in (a.up_weight.shape[1], a.down_weight.shape[1]))
    return out, pre


def _backward(a: Backward, backend: str) -> tuple[torch.Tensor, ...]:
    grads: tuple[torch.Tensor, ...] = _served(a, backend).backward(*a)
    return grads


def _backward_fake(a: Backward, backend: str) -> tuple[torch.Tensor, ...]:
    dx = a.x.new_empty(a.x.shape if a.need_input else 0)
    return dx, *like_bank(a.down_weight, a.need_down), *like_bank(a.up_weight, a.need_up)


# Returns (out [B, S, Hout], pre-activation [B, S, r]).
routed_adapter_op = define("routed_adapter", Forward, "(Tensor, Tensor)", _forward, _forward_fake)
# Returns (dx, d down_weight, d down_bias, d up_weight, d up_bias); what is not needed is an empty tensor.
routed_adapter_backward_op = define(
    "routed_adapter_backward", Backward, "(Tensor, Tensor, Tensor, Tensor, Tensor)", _backward, _backward_fake
)
